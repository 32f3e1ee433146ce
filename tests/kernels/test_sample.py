"""Tokens drawn by the kernel against the reference: truncations, ties, bans, extreme temperatures."""

import tomllib
from dataclasses import replace
from importlib.resources import files

import numpy as np
import pytest
import torch

from flexjudge_fast.kernels.sample import sample
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
    rows = 3 * torch.randn(5, 300, generator=generator)
    draws = [Draw(i % 5, 20 * (i % 3), 1.0, 1 - 0.1 * (i % 2), 0.0, i / 11) for i in range(11)]
    banned = [tuple(range(i % 4)) for i in range(11)]
    together = drawn(rows, draws, banned)
    for draw, ids, token in zip(draws, banned, together, strict=True):
        assert drawn(rows, [draw], [ids]) == [token]
        assert token == sample_reference(rows[draw.row], draw, ids)


SHAPES = ("peaked", "one finite", "flat", "tied at the border", "two values")


def whole_row(shape):
    """A row of a real vocabulary's size, and draws from it that differ in what they truncate."""
    rng = np.random.default_rng(3)
    row = 4 * rng.standard_normal(152064).astype(np.float32)
    truncated = [(0, 0.5, 0.0), (0, 0.95, 0.0), (50, 0.9, 0.0), (1, 1.0, 0.0), (0, 1.0, 0.05), (0, 1e-9, 0.0)]
    if shape == "one finite":
        row[:] = -np.inf
        row[100_000] = -3.0
    elif shape == "flat":
        row[:] = 2.5
        truncated = [(20, 1.0, 0.0), (0, 0.5, 0.0)]
    elif shape == "tied at the border":
        row[rng.permutation(152064)[:60]] = 30.0  # more than top-k, and than top-p
    elif shape == "two values":
        row = np.where(rng.random(152064) < 1e-4, 9.0, -9.0).astype(np.float32)
    draws = [Draw(0, k, 0.5, p, min_p, u) for k, p, min_p in truncated for u in (0.0, 0.61)]
    return torch.from_numpy(row), [Draw(0, 0, t, 1.0, 0.0, 0.37) for t in (0.0, 0.5)] + draws


@pytest.mark.parametrize("shape", ["peaked", "tied at the border"])
def test_a_whole_vocabulary(shape, monkeypatch):
    """With the tiles of a GPU. Other shapes are left to one: they take passes over 4752 groups."""
    table = tomllib.loads((files("flexjudge_fast.kernels") / "tile_tables/sample.toml").read_text())["sample"]
    monkeypatch.setattr("flexjudge_fast.kernels.sample.tiles", lambda _, case: table["default"][case])
    row, draws = whole_row(shape)
    draws = draws[1::2]
    banned = int(row.argmax()) if shape == "peaked" else 7
    for draw, found in zip(draws, drawn(row[None], draws, [(banned,)] * len(draws)), strict=True):
        wanted = sample_reference(row, draw, (banned,))
        assert found == wanted or (draw.temperature and found in near(row, draw, (banned,)))


def test_rows_that_are_not_finite():
    """Any token, but one: no hang, and no id beyond the vocabulary."""
    rows = torch.randn(4, 100)
    rows[0, 3], rows[1], rows[2, 5], rows[3] = torch.nan, torch.nan, torch.inf, -torch.inf
    kinds = [(0, 0.0, 1.0), (0, 1.0, 1.0), (5, 1.0, 1.0), (0, 1.0, 0.9), (80, 1.0, 0.9)]
    masks = BannedMasks(100, rows.device)
    integers = torch.tensor([(i, k, -1) for i in range(4) for k, _, _ in kinds], dtype=torch.int32)
    floats = torch.tensor([(t, p, 0.0, 0.5) for _ in range(4) for _, t, p in kinds])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens = sample(*(x.to(device) for x in (rows, integers, floats, masks.bits)))
    assert ((tokens >= 0) & (tokens < 100)).all()


def test_nothing_to_draw():
    assert drawn(torch.zeros(1, 10), [], []) == []


@pytest.mark.gpu
def test_on_a_gpu(monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device here")
    monkeypatch.delenv("FLEXJUDGE_BACKEND")
    cases = [random_case(seed) for seed in range(400)]
    cases += [(row, draw, (7,)) for row, draws in map(whole_row, SHAPES) for draw in draws]
    for row, draw, banned in cases:
        (found,) = drawn(row[None].cuda(), [draw], [banned])
        assert found == sample_reference(row, draw, banned) or found in near(row, draw, banned)


@pytest.mark.gpu
def test_a_full_batch_on_a_gpu():
    """512 draws at once and one at a time: the same tokens."""
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device here")
    rows = 4 * torch.randn(512, 152064, device="cuda")
    kinds = [(0, 1.0), (0, 0.5), (50, 0.9), (0, 0.95)]
    draws = [Draw(i, *(kinds[i % 4][0], i % 3 / 2, kinds[i % 4][1]), 0.0, i / 512) for i in range(512)]
    together = drawn(rows, draws, [()] * 512)
    assert together == [drawn(rows, [draw], [()])[0] for draw in draws]
