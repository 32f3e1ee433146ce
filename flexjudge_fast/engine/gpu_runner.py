"""Runs steps on a GPU: queued, not waited for; decode steps as recorded graphs; tokens drawn there, too."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from typing import Any, cast

import torch

from flexjudge_fast.engine.attention_plans import AttentionPlanner
from flexjudge_fast.engine.batch import Batch
from flexjudge_fast.engine.device import Device, Event, Graph
from flexjudge_fast.engine.encoder_runner import EncoderRunner
from flexjudge_fast.engine.graph_ladder import GraphLadder, Rung
from flexjudge_fast.engine.input_buffers import InputBuffers, ModelInput
from flexjudge_fast.engine.launch import Behind, DeviceDraw, DeviceResult
from flexjudge_fast.engine.model_runner import ModelRunner
from flexjudge_fast.layers.attention import AttentionInput
from flexjudge_fast.models.decoder import Decoder
from flexjudge_fast.ops.attention_plan import AttentionPlan, HostPlan
from flexjudge_fast.ops.flash_attention import HostFlashPlan
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
    is_recorded: bool
    done: Event | None = None  # and its logits kept, if they must be
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
        planner: of the attention backend.
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
        planner: AttentionPlanner,
        encoder: EncoderRunner | None = None,
        ladder: GraphLadder | None = None,
    ) -> None:
        first = buffers()
        super().__init__(model, kv_dtype, num_blocks, block_size, first, device.torch_device, encoder)
        self._device = device
        self._planner = planner
        self._ladder = ladder
        pin = device.torch_device.type == "cuda"
        self._slots = [_Slot(first, max_rows, pin), _Slot(buffers(), max_rows, pin)]
        self._masks = BannedMasks(model.config.vocab_size, device.torch_device)
        # Recorded steps take turns with it: what is still to be read when the next is launched is copied.
        rows = 0 if ladder is None else ladder.num_seqs[-1]
        self._logits = torch.empty(rows, model.config.vocab_size, device=device.torch_device)
        self._recorded: dict[tuple[Rung | None, int], _Recorded] = {}
        self.num_replays = 0

    def run(self, batch: Batch) -> tuple[torch.Tensor, list[bool]]:
        """See `ModelRunner.run`."""
        found = self.launch(batch, (), None).wait()
        return found.logits, list(found.finite)

    @torch.inference_mode()
    def launch(self, batch: Batch, draws: Sequence[DeviceDraw], behind: Behind | None) -> GpuFlight:
        """See `LaunchingRunner.launch`."""
        with self._device.active():
            if behind is not None and behind.keep and behind.flight.is_recorded:
                self._keep_logits(behind.flight)
            return self._launch(batch, draws, behind)

    def beside(self) -> AbstractContextManager[object]:
        """See `LaunchingRunner.beside`."""
        return self._device.beside()

    def release(self) -> None:
        """See `ModelRunner.release`; recorded steps and their logits, too."""
        super().release()
        del self._recorded, self._logits

    def _keep_logits(self, flight: GpuFlight) -> None:
        """A copy, as the next recorded step writes where they are."""

        def work() -> None:
            with torch.inference_mode():
                assert flight.logits is not None
                flight.logits = flight.logits.clone()

        self._device.submit(work)
        flight.done = self._device.record()

    def _launch(self, batch: Batch, draws: Sequence[DeviceDraw], behind: Behind | None) -> GpuFlight:
        slot = self._slots[0]
        self._slots.reverse()
        slot.wait()
        embeddings = {} if self.encoder is None else self.encoder.run(batch)
        rung = self._rung(batch)
        inputs = slot.buffers.fill(batch, embeddings, rung)
        plan = self._planner.plan(inputs.attention, rung)
        num_rows = sum(len(chunk.logit_positions) for chunk in batch.chunks)
        flight = GpuFlight(slot, num_rows, len(draws), rung is not None)

        def work() -> None:
            with torch.inference_mode():
                copy_blocks(self.cache, batch.block_copies)
                logits, finite = self._step(inputs, plan, rung, behind)
                flight.logits = logits[:num_rows]
                flight.tokens = sample_on_device(
                    flight.logits, [d.draw for d in draws], [d.banned for d in draws], self._masks
                )
                slot.results[0, : len(draws)].copy_(flight.tokens, non_blocking=True)
                slot.results[1, :num_rows].copy_(finite[:num_rows], non_blocking=True)

        self._device.submit(work)
        self.num_forward_tokens += batch.num_tokens
        flight.done = slot.read = self._device.record()
        return flight

    def _rung(self, batch: Batch) -> Rung | None:
        """The graph for this step, if it is a decode step: one token of each sequence, and its logits."""
        chunks = batch.chunks
        if self._ladder is None or any(c.num_tokens != 1 or len(c.logit_positions) != 1 for c in chunks):
            return None
        if any(run.start < c.end and run.end > c.start for c in chunks for run in c.request.media):
            return None
        return self._ladder.pick(len(chunks), max((len(c.request.block_table) for c in chunks), default=0))

    def _step(
        self,
        inputs: ModelInput,
        plan: HostPlan | HostFlashPlan | None,
        rung: Rung | None,
        behind: Behind | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and which rows are finite."""
        key = (rung, plan.cut.decode_rows if isinstance(plan, HostPlan) else 0)
        recorded = None if rung is None else self._recorded.get(key)
        if recorded is None:
            here = _upload(inputs, plan, self._device.torch_device)
        else:
            here = recorded.inputs
            _overwrite(here, inputs, plan)
        if behind is not None and behind.feed:
            drawn = behind.flight.tokens
            starts = inputs.attention.query_start.tolist()
            where = torch.tensor([[starts[i] for i in behind.feed], list(behind.feed.values())])
            places, sources = where.to(drawn.device, non_blocking=True)
            here.token_ids[places] = drawn[sources]

        out = None if rung is None else self._logits[: rung.num_seqs]
        decoder = cast(Decoder, self.model)  # PackedModel is for the CPU

        def run() -> tuple[torch.Tensor, torch.Tensor]:
            return decoder.step(here.token_ids, here.attention, self.cache, here.logit_rows, out)

        if rung is None:
            return run()
        if recorded is None:
            run()  # compiles what is not compiled yet
            graph, (logits, finite) = self._device.capture(run)
            recorded = self._recorded[key] = _Recorded(here, logits, finite, graph)
        recorded.graph.replay()
        self.num_replays += 1
        return recorded.logits, recorded.finite


def _upload(inputs: ModelInput, plan: HostPlan | HostFlashPlan | None, device: torch.device) -> ModelInput:
    """Copies on the device. The originals are pinned, and may be changed once the copies are made."""
    return replace(
        inputs,
        token_ids=_copied(inputs.token_ids, device),
        logit_rows=_copied(inputs.logit_rows, device),
        attention=replace(
            inputs.attention,
            plan=None if plan is None else plan.to(device),
            **_uploaded(inputs.attention, device),
        ),
    )


def _uploaded(inputs: AttentionInput, device: torch.device) -> dict[str, Any]:
    return {name: _copied(x, device) for name, x in _tensors(inputs)}


def _copied(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    return x.clone() if x.device == device else x.to(device, non_blocking=True)


def _overwrite(recorded: ModelInput, inputs: ModelInput, plan: HostPlan | HostFlashPlan | None) -> None:
    """Put another step of the same size into a recorded step's memory."""
    recorded.token_ids.copy_(inputs.token_ids, non_blocking=True)
    taken = recorded.attention
    for name, x in _tensors(inputs.attention):
        getattr(taken, name).copy_(x, non_blocking=True)
    if isinstance(taken.plan, AttentionPlan) and isinstance(plan, HostPlan):
        taken.plan.copy_(plan)


def _tensors(inputs: AttentionInput) -> Iterator[tuple[str, Any]]:
    for field in fields(inputs):
        value = getattr(inputs, field.name)
        if isinstance(value, torch.Tensor):
            yield field.name, value
