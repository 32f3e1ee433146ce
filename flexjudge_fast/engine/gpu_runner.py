"""Runs steps on a GPU: queued, not waited for; decode steps as recorded graphs; tokens drawn there, too."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from flexjudge_fast.engine.batch import Batch
from flexjudge_fast.engine.device import Device, Event, Graph
from flexjudge_fast.engine.encoder_runner import EncoderRunner
from flexjudge_fast.engine.graph_ladder import GraphLadder, Rung
from flexjudge_fast.engine.input_buffers import InputBuffers, ModelInput
from flexjudge_fast.engine.launch import DeviceDraw, DeviceResult
from flexjudge_fast.engine.model_runner import ModelRunner
from flexjudge_fast.models.decoder import Decoder
from flexjudge_fast.ops.kv_cache import copy_blocks
from flexjudge_fast.ops.sample import BannedMasks, sample_on_device


class _Slot:
    """Pinned memory for one step's inputs and results. Two of them take turns."""

    def __init__(self, buffers: InputBuffers, max_rows: int, pin: bool) -> None:
        self.buffers = buffers
        self.results = torch.zeros(2, max_rows, dtype=torch.int64, pin_memory=pin)  # tokens, finite
        self.read: Event | None = None  # behind the last step that used it

    def wait(self) -> None:
        """Until the device has read and written it."""
        if self.read is not None:
            self.read.wait()


@dataclass(eq=False)
class GpuFlight:
    """A step that is queued. `tokens` and `logits` are on the device, and there when it has run."""

    slot: _Slot
    num_rows: int
    num_draws: int
    done: Event | None = None
    tokens: torch.Tensor | None = None  # [num_draws] int64
    logits: torch.Tensor | None = None  # [num_rows, vocab_size] float32

    def wait(self) -> DeviceResult:
        """See `InFlight.wait`."""
        assert self.done is not None
        self.done.wait()
        assert self.logits is not None
        tokens, finite = self.slot.results
        return DeviceResult(
            self.logits, finite[: self.num_rows].bool().tolist(), tokens[: self.num_draws].tolist()
        )


@dataclass(frozen=True, eq=False)
class _Recorded:
    """A decode step of one size: its inputs and results lie where they lay when it was recorded."""

    inputs: ModelInput
    logits: torch.Tensor
    finite: torch.Tensor
    graph: Graph


class GpuRunner(ModelRunner):
    """A `ModelRunner` whose steps are launched and waited for apart.

    Args:
        buffers: makes the (pinned) memory of a step's inputs; called twice.
        max_rows: the most rows of logits, and draws, of a step.
        ladder: sizes of decode steps that are recorded as graphs, at their first use; none if `None`.
    """

    def __init__(
        self,
        model: Decoder,
        kv_dtype: torch.dtype,
        num_blocks: int,
        block_size: int,
        buffers: Callable[[], InputBuffers],
        max_rows: int,
        device: Device,
        encoder: EncoderRunner | None = None,
        ladder: GraphLadder | None = None,
    ) -> None:
        first = buffers()
        super().__init__(model, kv_dtype, num_blocks, block_size, first, device.torch_device, encoder)
        self._device = device
        self._ladder = ladder
        pin = device.torch_device.type == "cuda"
        self._slots = [_Slot(first, max_rows, pin), _Slot(buffers(), max_rows, pin)]
        self._masks = BannedMasks(model.config.vocab_size, device.torch_device)
        self._recorded: dict[Rung, _Recorded] = {}
        self.num_replays = 0

    def run(self, batch: Batch) -> tuple[torch.Tensor, list[bool]]:
        """See `ModelRunner.run`."""
        found = self.launch(batch, (), None, {}).wait()
        return found.logits, list(found.finite)

    @torch.inference_mode()
    def launch(
        self, batch: Batch, draws: Sequence[DeviceDraw], behind: GpuFlight | None, feed: Mapping[int, int]
    ) -> GpuFlight:
        """See `LaunchingRunner.launch`."""
        slot = self._slots[0]
        self._slots.reverse()
        slot.wait()
        embeddings = {} if self.encoder is None else self.encoder.run(batch)
        inputs = slot.buffers.fill(batch, embeddings)
        rung = self._rung(batch, inputs)
        flight = GpuFlight(slot, len(inputs.logit_rows), len(draws))

        def work() -> None:
            with torch.inference_mode():
                copy_blocks(self.cache, batch.block_copies)
                known = None if behind is None else behind.tokens
                flight.logits, finite = self._step(inputs, rung, known, feed)
                flight.tokens = sample_on_device(
                    flight.logits, [d.draw for d in draws], [d.banned for d in draws], self._masks
                )
                slot.results[0, : len(draws)].copy_(flight.tokens, non_blocking=True)
                slot.results[1, : flight.num_rows].copy_(finite, non_blocking=True)

        self._device.submit(work)
        self.num_forward_tokens += batch.num_tokens
        flight.done = slot.read = self._device.record()
        return flight

    def _rung(self, batch: Batch, inputs: ModelInput) -> Rung | None:
        """The graph that this step fits, if it is a decode step: one token and one row for each sequence."""
        tables = inputs.attention.block_tables
        is_decode = len(inputs.token_ids) == len(batch.chunks) == len(inputs.logit_rows)
        if self._ladder is None or not is_decode or inputs.attention.media is not None:
            return None
        return self._ladder.pick(*tables.shape)

    def _step(
        self, inputs: ModelInput, rung: Rung | None, known: torch.Tensor | None, feed: Mapping[int, int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and which rows are finite; `feed`: places in `known` of the tokens that begin chunks."""
        uploaded = _upload(inputs, self._device.torch_device)
        if feed:
            assert known is not None
            where = torch.tensor([list(feed), list(feed.values())], dtype=torch.int64)
            places, sources = where.to(self._device.torch_device, non_blocking=True)
            uploaded.token_ids[places] = known[sources]  # each chunk is one token
        if rung is None:
            attention = uploaded.attention
            logits, finite = self.model.step(uploaded.token_ids, attention, self.cache, uploaded.logit_rows)
            return logits, finite
        recorded = self._recorded.get(rung)
        if recorded is None:
            recorded = self._recorded[rung] = self._record(rung, uploaded)
        _pad(uploaded, recorded.inputs)
        recorded.graph.replay()
        self.num_replays += 1
        count = len(uploaded.logit_rows)
        return recorded.logits[:count], recorded.finite[:count]

    def _record(self, rung: Rung, like: ModelInput) -> _Recorded:
        """Record a decode step of this size."""
        inputs = _padded(rung, like)
        _pad(like, inputs)
        self.model.step(inputs.token_ids, inputs.attention, self.cache, inputs.logit_rows)  # compiles
        graph, (logits, finite) = self._device.capture(
            lambda: self.model.step(inputs.token_ids, inputs.attention, self.cache, inputs.logit_rows)
        )
        return _Recorded(inputs, logits, finite, graph)


def _upload(inputs: ModelInput, device: torch.device) -> ModelInput:
    """Copies on the device. The originals are pinned, and may be changed once the copies are made."""
    return replace(
        inputs,
        token_ids=_copied(inputs.token_ids, device),
        logit_rows=_copied(inputs.logit_rows, device),
        attention=replace(inputs.attention, **_tensors(inputs.attention, lambda x: _copied(x, device))),
    )


def _copied(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    return x.clone() if x.device == device else x.to(device, non_blocking=True)


def _tensors(of: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, Any]:
    values = {field.name: getattr(of, field.name) for field in fields(of)}
    return {name: change(x) for name, x in values.items() if isinstance(x, torch.Tensor)}


def _padded(rung: Rung, like: ModelInput) -> ModelInput:
    """Memory for a decode step of this size."""
    count, attention = rung.num_seqs, like.attention
    numbers = torch.arange(count + 1, device=like.token_ids.device)
    return ModelInput(
        token_ids=like.token_ids.new_zeros(count),
        attention=replace(
            attention,
            positions=attention.positions.new_zeros(*attention.positions.shape[:-1], count),
            slot_mapping=attention.slot_mapping.new_zeros(count),
            block_tables=attention.block_tables.new_zeros(count, rung.table_width),
            query_start=numbers.to(attention.query_start.device),
            context_lens=attention.context_lens.new_zeros(count),
        ),
        logit_rows=numbers[:count].clone(),
    )


def _pad(step: ModelInput, into: ModelInput) -> None:
    """Put a decode step into recorded memory; the sequences beyond it see nothing and write nothing."""
    given, taken = step.attention, into.attention
    count, width = given.block_tables.shape
    into.token_ids.zero_()[:count].copy_(step.token_ids)
    taken.positions.zero_()[..., :count].copy_(given.positions)
    taken.slot_mapping.fill_(-1)[:count].copy_(given.slot_mapping)
    taken.context_lens.zero_()[:count].copy_(given.context_lens)
    taken.block_tables.zero_()[:count, :width].copy_(given.block_tables)
