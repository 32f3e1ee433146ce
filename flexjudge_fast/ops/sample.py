"""Draws tokens from rows of logits."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from flexjudge_fast.ops.backend import has_compiled_ops, uses_triton


@dataclass(frozen=True)
class Draw:
    """One token wanted from a row of logits.

    `uniform` in [0, 1) picks it; temperature 0 is greedy and reads nothing else. `top_k` 0 keeps all.
    """

    row: int
    top_k: int
    temperature: float
    top_p: float
    min_p: float
    uniform: float


def sample_tokens(
    logits: torch.Tensor, draws: Sequence[Draw], banned: Sequence[int], threads: int
) -> list[int]:
    """One token id per draw.

    The token is the first at which the running sum of probabilities exceeds `uniform` of their total: in
    order of ids, or likeliest first where top-k, then top-p, then min-p leave some out.

    Args:
        logits: [num_rows, vocab_size] float32, finite.
        banned: ids no draw may give.
        threads: of the compiled op.
    """
    if logits.device.type == "cpu" and has_compiled_ops():
        wanted = [(d.row, d.top_k, d.temperature, d.top_p, d.min_p, d.uniform) for d in draws]
        # By way of numpy, which takes a tenth of torch's time for a few numbers.
        numbers = torch.from_numpy(np.array(wanted, dtype=np.float64).reshape(-1, 6))
        ids = torch.from_numpy(np.array(banned, dtype=np.int64))
        found: list[int] = torch.ops.flexjudge.sample_tokens(logits, numbers, ids, threads).tolist()
        return found
    return [sample_reference(logits[draw.row], draw, banned) for draw in draws]


class BannedMasks:
    """Sets of banned ids as bits on a device. A model has few of them: each is kept once it was asked for."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._numbers: dict[tuple[int, ...], int] = {}
        self.bits = torch.zeros(1, -(-vocab_size // 32), dtype=torch.int32, device=device)

    def number(self, ids: tuple[int, ...]) -> int:
        """The row of `bits` that bans these ids; -1 if there are none."""
        if not ids:
            return -1
        known = self._numbers.get(ids)
        if known is None:
            known = self._numbers[ids] = len(self._numbers)
            words = np.zeros(self.bits.shape[1], dtype=np.uint32)
            np.bitwise_or.at(
                words, np.array(ids) // 32, np.uint32(1) << (np.array(ids) % 32).astype(np.uint32)
            )
            row = torch.from_numpy(words.view(np.int32)).to(self.bits.device)
            self.bits = row[None] if known == 0 else torch.cat((self.bits, row[None]))
        return known


def sample_on_device(
    logits: torch.Tensor, draws: Sequence[Draw], banned: Sequence[tuple[int, ...]], masks: BannedMasks
) -> torch.Tensor:
    """`sample_tokens` for draws that each have banned ids of their own; the tokens stay where the logits are.

    A row with NaN gives any token. On a GPU nothing is waited for, and sums are in float32: a draw within a
    millionth of the border between two tokens may fall to the other.

    Returns:
        [num_draws] int64.
    """
    if uses_triton(logits):
        from flexjudge_fast.kernels.sample import sample as kernel

        num_draws, vocab = len(draws), logits.shape[1]
        numbers = np.empty(7 * num_draws, dtype=np.float32)  # floats, then integers: one upload
        floats = [(d.temperature, d.top_p, d.min_p, d.uniform) for d in draws]
        integers = [(d.row, min(d.top_k, vocab), masks.number(i)) for d, i in zip(draws, banned, strict=True)]
        numbers[: 4 * num_draws] = np.array(floats, dtype=np.float32).ravel()
        numbers[4 * num_draws :].view(np.int32)[:] = np.array(integers, dtype=np.int32).ravel()
        there = torch.from_numpy(numbers).to(logits.device, non_blocking=True)
        there_too = there[4 * num_draws :].view(torch.int32)
        return kernel(logits, there_too.view(-1, 3), there[: 4 * num_draws].view(-1, 4), masks.bits)
    rows = [logits[draw.row] for draw in draws]
    found = [
        0 if row.isnan().any() else sample_reference(row, draw, ids)
        for row, draw, ids in zip(rows, draws, banned, strict=True)
    ]
    return torch.tensor(found, dtype=torch.int64, device=logits.device)


def sample_reference(row: torch.Tensor, draw: Draw, banned: Sequence[int] = ()) -> int:
    """`sample_tokens` for one row [vocab_size], in float64."""
    row = row.double()
    row[torch.as_tensor(banned, dtype=torch.int64, device=row.device)] = -torch.inf
    if draw.temperature == 0:
        return int((row == row.max()).nonzero()[0])
    probs = torch.softmax(row / draw.temperature, dim=-1)
    ids = torch.arange(len(probs), device=row.device)
    if draw.top_k or draw.top_p < 1 or draw.min_p > 0:
        probs, ids = _truncate(*probs.sort(descending=True, stable=True), draw)
    cumulative = probs.cumsum(0)
    index = int(torch.searchsorted(cumulative, draw.uniform * float(cumulative[-1]), right=True))
    return int(ids[min(index, len(ids) - 1)])


def _truncate(probs: torch.Tensor, ids: torch.Tensor, draw: Draw) -> tuple[torch.Tensor, torch.Tensor]:
    """top-k, then top-p over what is left, then min-p; `probs` is sorted."""
    kept = min(draw.top_k or len(probs), len(probs))
    probs, ids = probs[:kept], ids[:kept]
    before = probs.cumsum(0) - probs  # probability of everything likelier
    keep = (before < draw.top_p * probs.sum()) | (draw.top_p >= 1)
    keep &= probs >= draw.min_p * probs[0]
    return probs[keep], ids[keep]
