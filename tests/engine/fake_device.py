"""A device that does its work as late as it may, and a model that any wrong byte of its cache shows in."""

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch

from flexjudge_fast.engine.device import Event, Graph, Tensors
from flexjudge_fast.layers.attention import AttentionInput
from flexjudge_fast.models.config import DecoderConfig


class FakeDevice:
    """Runs nothing before an event behind it is waited for: who reads or overwrites too early is found.

    eager: runs everything at once instead: who reads what the next step overwrites is found.
    """

    torch_device = torch.device("cpu")

    def __init__(self, eager: bool = False) -> None:
        self._eager = eager
        self._queue: list[Callable[[], None]] = []
        self._done = 0

    def active(self) -> AbstractContextManager[object]:
        return nullcontext()

    def submit(self, work: Callable[[], None]) -> None:
        self._queue.append(work)
        if self._eager:
            self.run_to(len(self._queue))

    def beside(self) -> AbstractContextManager[object]:
        return nullcontext()

    def record(self) -> Event:
        return _FakeEvent(self, len(self._queue))

    def capture(self, work: Callable[[], Tensors]) -> tuple[Graph, Tensors]:
        found = work()
        return _FakeGraph(work, found), found

    def run_to(self, end: int) -> None:
        while self._done < end:
            self._done += 1
            try:
                self._queue[self._done - 1]()
            except BaseException:
                self._done = len(self._queue)  # what stood behind it is lost
                raise


class _FakeEvent:
    def __init__(self, device: FakeDevice, end: int) -> None:
        self._device, self._end = device, end

    def wait(self) -> None:
        self._device.run_to(self._end)


class _FakeGraph:
    def __init__(self, work: Callable[[], Tensors], found: Tensors) -> None:
        self._work, self._found = work, found

    def replay(self) -> None:
        for old, new in zip(self._found, self._work(), strict=True):
            old.copy_(new)


class HashModel:
    """Logits are a hash of what the cache holds for a sequence: a wrong token, place or medium changes them.

    bad_share: of contexts, those whose logits are NaN.
    """

    def __init__(self, config: DecoderConfig, bad_share: float = 0.0) -> None:
        self.config = config
        self.dtype = torch.float32
        self.bad_share = bad_share

    def step(
        self,
        token_ids: torch.Tensor,
        inputs: AttentionInput,
        cache: torch.Tensor,
        logit_rows: torch.Tensor,
        out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        held = cache[0, 0, :, :, 0, 0]  # [num_blocks, block_size]
        block_size = held.shape[1]
        for key, slot in zip(self._keys(token_ids, inputs), inputs.slot_mapping.tolist(), strict=True):
            if slot >= 0:
                held[slot // block_size, slot % block_size] = key
        starts, lens = inputs.query_start.tolist(), inputs.context_lens.tolist()
        rows = []
        for index in logit_rows.tolist():
            i = max(i for i in range(len(lens)) if starts[i] <= index)
            context = lens[i] - (starts[i + 1] - 1 - index)
            tokens = held[inputs.block_tables[i]].flatten()[:context]
            rows.append(self._logits(tokens.numpy().astype(np.int64)))
        logits = torch.stack(rows) if rows else torch.zeros(0, self.config.vocab_size)
        logits = logits if out is None else out.copy_(logits)
        return logits, torch.isfinite(logits).all(-1)

    def _keys(self, token_ids: torch.Tensor, inputs: AttentionInput) -> list[int]:
        """A number for each token, exact in float32: of its id or medium's row, and of its positions."""
        positions = inputs.positions.reshape(-1, len(token_ids)).T.tolist()
        keys = []
        for token_id, place in zip(token_ids.tolist(), positions, strict=True):
            if token_id >= self.config.vocab_size:
                assert inputs.media is not None
                row = inputs.media[token_id - self.config.vocab_size].numpy().tobytes()
                token_id = 1000 + int.from_bytes(hashlib.blake2b(row, digest_size=2).digest(), "little")
            keys.append((31 * token_id + sum(i * p for i, p in enumerate(place, 1))) % 4000037)
        return keys

    def _logits(self, tokens: np.ndarray) -> torch.Tensor:
        digest = hashlib.blake2b(tokens.tobytes(), digest_size=8).digest()
        rng = np.random.default_rng(int.from_bytes(digest, "little"))
        if rng.random() < self.bad_share:
            return torch.full((self.config.vocab_size,), torch.nan)
        return torch.from_numpy(4 * rng.standard_normal(self.config.vocab_size, np.float32))
