"""Tokens drawn by the kernel against the reference: truncations, ties, bans, extreme temperatures."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from flexjudge_fast.ops.sample import BannedMasks, Draw, _truncate, sample_on_device, sample_reference
from tests.interpreted import SWEEP

NEAR = 1e-6  # of a boundary between two tokens, where float32 sums may fall on the other side


def random_case(seed):
    """A row of logits of some kind, a draw, and ids that are banned."""
    rng = np.random.default_rng(seed)
    vocab = int(rng.choice([1, 2, 31, 33, 100, 257, 500, 1025]))
    kind = rng.choice(["normal", "ties", "peaked", "equal", "holes", "zeros"])
    row = 3 * rng.standard_normal(vocab).astype(np.float32)
    if kind == "ties":
        row = np.round(row)
    elif kind == "peaked":
        row[rng.integers(vocab)] += 20
    elif kind == "equal":
        row[:] = -2.5
    elif kind == "holes":
        row[rng.random(vocab) < 0.5] = -np.inf
        row[rng.integers(vocab)] = 1.0
    elif kind == "zeros":
        row = np.where(rng.random(vocab) < 0.5, 0.0, -0.0).astype(np.float32)
    finite = np.flatnonzero(np.isfinite(row))
    banned = rng.permutation(vocab)[: int(rng.integers(0, 6))] if rng.random() < 0.5 else np.zeros(0, int)
    if not np.setdiff1d(finite, banned).size:
        banned = banned[:0]
    draw = Draw(
        row=0,
        top_k=int(rng.choice([0, 0, 1, 5, 50, 3000])),
        temperature=float(rng.choice([0.0, 0.05, 0.4, 1.0, 1.0, 30.0])),
        top_p=float(rng.choice([1.0, 1.0, 0.1, 0.5, 0.9, 0.999])),
        min_p=float(rng.choice([0.0, 0.0, 0.1, 0.9])),
        uniform=float(rng.choice([0.0, 1 - 2**-53, *rng.random(4)])),
    )
    return torch.from_numpy(row), draw, tuple(banned.tolist())


def drawn(rows, draws, banned):
    masks = BannedMasks(rows.shape[1], rows.device)
    return sample_on_device(rows, draws, banned, masks).tolist()


def near(row, draw, banned):
    """All tokens whose share of the reference's distribution lies within `NEAR` of the draw's number."""
    row = row.double()
    row[list(banned)] = -torch.inf
    found = set()
    for sway in (1 - NEAR, 1, 1 + NEAR):
        top_p = 1.0 if draw.top_p == 1 else draw.top_p * sway
        for min_p in (draw.min_p * (1 - NEAR), draw.min_p, draw.min_p * (1 + NEAR)):
            probs, ids = torch.softmax(row / draw.temperature, -1), torch.arange(len(row))
            if draw.top_k or top_p < 1 or min_p > 0:
                other = replace(draw, top_p=top_p, min_p=min_p)
                probs, ids = _truncate(*probs.sort(descending=True, stable=True), other)
            after = probs.cumsum(0) / probs.sum()
            before = after - probs / probs.sum()
            found |= set(ids[(before <= draw.uniform + NEAR) & (after >= draw.uniform - NEAR)].tolist())
    return found


@pytest.mark.parametrize("part", range(8))
def test_many_draws(part):
    differ = 0
    for seed in range(part, 208 * SWEEP, 8):
        row, draw, banned = random_case(seed)
        wanted = sample_reference(row, draw, banned)
        (found,) = drawn(row[None], [draw], [banned])
        if found != wanted:
            differ += 1
            assert draw.temperature and found in near(row, draw, banned), (seed, draw, banned)
    assert differ <= 2 * SWEEP


def test_rows_and_masks_of_a_batch():
    """Each draw has its row and its bans; in a batch and alone, the same tokens."""
    generator = torch.Generator().manual_seed(0)
    rows = 3 * torch.randn(5, 700, generator=generator)
    draws = [Draw(i % 5, 20 * (i % 3), 1.0, 1 - 0.1 * (i % 2), 0.0, i / 17) for i in range(17)]
    banned = [tuple(range(i % 4)) for i in range(17)]
    together = drawn(rows, draws, banned)
    for draw, ids, token in zip(draws, banned, together, strict=True):
        assert drawn(rows, [draw], [ids]) == [token]
        assert token == sample_reference(rows[draw.row], draw, ids)


def test_nothing_to_draw():
    assert drawn(torch.zeros(1, 10), [], []) == []


@pytest.mark.gpu
def test_on_a_gpu(monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device here")
    monkeypatch.delenv("FLEXJUDGE_BACKEND")
    for seed in range(400):
        row, draw, banned = random_case(seed)
        (found,) = drawn(row[None].cuda(), [draw], [banned])
        assert found == sample_reference(row, draw, banned) or found in near(row, draw, banned)
