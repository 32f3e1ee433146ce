"""Weights to blocks: the compiled op against the reference, errors against the best possible, odd blocks."""

import pytest
import torch

from flexjudge_fast.ops.dequantize import dequantize
from flexjudge_fast.ops.quantize import quantize, quantize_reference

pytestmark = pytest.mark.usefixtures("compiled")

SIZES = {"I8_32": 32, "Q4_1": 32, "I4_64": 64, "I4_128": 128}
LEVELS = {"I8_32": 255, "Q4_1": 15, "I4_64": 15, "I4_128": 15}


def random_weight(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Normal values, some rows shifted, some with outliers."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator) * 0.05
    x[::3] += 0.1
    x[1::4, 5] = 2.0
    return x


def squared_error(weight: torch.Tensor, blocks: torch.Tensor, name: str) -> float:
    return float((dequantize(blocks, name) - weight).double().square().sum())


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize(("rows", "blocks"), [(1, 1), (7, 3), (130, 5)])
def test_compiled_is_the_reference(name, rows, blocks):
    """Sums are rounded in another order: the codes may differ in few places, the error must not."""
    weight = random_weight(rows, blocks * SIZES[name], seed=rows)
    got, want = quantize(weight, name), quantize_reference(weight, name)
    assert got.shape == want.shape
    assert (got != want).double().mean() < 0.02
    assert squared_error(weight, got, name) == pytest.approx(squared_error(weight, want, name), rel=1e-3)


@pytest.mark.parametrize("name", SIZES)
def test_error_is_below_plain_rounding(name):
    """Better than the range cut into equal steps, and nowhere off by more than a step."""
    weight = random_weight(64, 4 * SIZES[name], seed=1)
    x = weight.unflatten(1, (-1, SIZES[name]))
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    step = (high - low) / LEVELS[name]
    plain = float((((x - low) / step).round() * step + low - x).double().square().sum())
    blocks = quantize(weight, name)
    assert squared_error(weight, blocks, name) < plain
    if name == "I8_32":
        error = (dequantize(blocks, name) - weight).abs().unflatten(1, (-1, SIZES[name]))
        assert bool((error <= step).all())


@pytest.mark.parametrize("quantize", [quantize, quantize_reference])
@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("value", [0.0, 1.0, -0.5, 1e-7])
def test_constant_blocks(name, value, quantize):
    """A block of one value keeps it, as a half float has it."""
    weight = torch.full((3, 2 * SIZES[name]), value)
    assert torch.equal(dequantize(quantize(weight, name), name), weight.half().float())


@pytest.mark.parametrize("quantize", [quantize, quantize_reference])
@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e8])
def test_what_a_half_float_cannot_hold_shows(name, bad, quantize):
    """Such a block is not finite, so that loading refuses it; its neighbours are as they would be alone."""
    weight = random_weight(2, 3 * SIZES[name], seed=3)
    want = quantize(weight, name)
    weight[0, SIZES[name] + 3] = bad
    got = dequantize(quantize(weight, name), name)
    assert not bool(got[0, SIZES[name] : 2 * SIZES[name]].isfinite().all())
    mask = torch.ones_like(got, dtype=torch.bool)
    mask[0, SIZES[name] : 2 * SIZES[name]] = False
    assert torch.equal(got[mask], dequantize(want, name)[mask])


def test_wrong_shapes_are_refused():
    for way in (quantize, quantize_reference):
        with pytest.raises(RuntimeError, match="multiple of 64"):
            way(torch.zeros(2, 96), "I4_64")
