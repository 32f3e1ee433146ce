"""RMS norm with and without residual and quantisation, against float64; its codes, to the bit."""

from collections.abc import Iterator

import pytest
import torch

from flexjudge_fast.ops.linear_w8a8 import quantize_tokens_reference
from flexjudge_fast.ops.rms_norm import (
    add_rms_norm,
    add_rms_norm_quantized,
    rms_norm,
    rms_norm_quantized,
    rms_norm_reference,
)
from tests.interpreted import SWEEP, in_nan, rows_close

NUM_CASES = 200 * SWEEP
NUM_PARTS = 4
HIDDEN = (1, 7, 16, 63, 64, 65, 100, 128, 200, 256)
CODES = (torch.int8, torch.float8_e4m3fn)


def _cases(part: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]]:
    """x, residual, weight, eps; some rows are zeros."""
    for seed in range(part, NUM_CASES, NUM_PARTS):
        g = torch.Generator().manual_seed(seed)
        dtype = (torch.float16, torch.float32)[seed % 2]
        tokens, hidden = (0, 1, 2, 5, 9)[seed // 4 % 5], HIDDEN[seed // 2 % len(HIDDEN)]
        scale = 10.0 ** float(torch.randint(-2, 3, (1,), generator=g))
        x, residual = torch.randn(2, tokens, hidden, generator=g) * scale
        empty = torch.rand(tokens, generator=g) < 0.1
        x[empty], residual[empty] = 0, 0
        weight = torch.rand(hidden, generator=g) * 2 - 0.5
        yield x.to(dtype), residual.to(dtype), weight.to(dtype), (1e-6, 1e-5)[seed % 2]


@pytest.mark.parametrize("part", range(NUM_PARTS))
def test_matches_float64(part: int) -> None:
    for x, residual, weight, eps in _cases(part):
        inputs = [in_nan(tensor) for tensor in (x, residual, weight)]
        alone = rms_norm(inputs[0], inputs[2], eps)
        assert alone.dtype == x.dtype
        assert rows_close(alone, rms_norm_reference(x.double(), weight.double(), eps), 1e-3)
        normed, total = add_rms_norm(*inputs, eps)
        assert torch.equal(total, residual + x)
        assert rows_close(normed, rms_norm_reference(total.double(), weight.double(), eps), 1e-3)


@pytest.mark.parametrize("part", range(NUM_PARTS))
def test_codes_are_those_of_the_norm(part: int) -> None:
    for i, (x, residual, weight, eps) in enumerate(_cases(part)):
        dtype = CODES[i % 2]
        inputs = [in_nan(tensor) for tensor in (x, residual, weight)]
        codes, scales = rms_norm_quantized(inputs[0], inputs[2], eps, dtype)
        expected, expected_scales = quantize_tokens_reference(rms_norm(*inputs[::2], eps), dtype)
        assert codes.dtype == dtype
        assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8))
        assert torch.equal(scales, expected_scales)
        codes, scales, total = add_rms_norm_quantized(*inputs, eps, dtype)
        normed, expected_total = add_rms_norm(*inputs, eps)
        expected, expected_scales = quantize_tokens_reference(normed, dtype)
        assert torch.equal(total, expected_total)
        assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8))
        assert torch.equal(scales, expected_scales)


def test_every_float8_code_and_the_ties_between_them() -> None:
    """Norms of rows whose square mean is known: values come out as the weights, half to even."""
    every = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    between = (every[1:] + every[:-1]) / 2
    weight = torch.cat([every, between, -every, -between, torch.nextafter(between, every[1:])])
    codes, scales = rms_norm_quantized(torch.ones(1, len(weight)), weight, 0.0, torch.float8_e4m3fn)
    assert scales.tolist() == [1.0]
    expected = (weight.to(torch.float8_e4m3fn).float() + 0.0).to(torch.float8_e4m3fn)
    assert torch.equal(codes[0].view(torch.uint8), expected.view(torch.uint8))


def test_a_token_has_the_same_bits_in_any_batch() -> None:
    g = torch.Generator().manual_seed(1)
    x, residual = torch.randn(2, 40, 200, generator=g).half()
    weight = torch.randn(200, generator=g).half()
    normed, total = add_rms_norm(x, residual, weight, 1e-6)
    for i in (0, 17, 39):
        alone = add_rms_norm(x[i : i + 1], residual[i : i + 1], weight, 1e-6)
        assert torch.equal(alone[0], normed[i : i + 1])
        assert torch.equal(alone[1], total[i : i + 1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("part", range(NUM_PARTS))
def test_on_a_gpu_in_bfloat16(part: int) -> None:
    for case in _cases(part):
        x, residual, weight = (in_nan(tensor.bfloat16(), "cuda") for tensor in case[:3])
        normed, total = add_rms_norm(x, residual, weight, case[3])
        assert torch.equal(total, residual + x)
        assert rows_close(normed, rms_norm_reference(total.double(), weight.double(), case[3]), 1.2e-2)
        for dtype in CODES:
            codes, scales, _ = add_rms_norm_quantized(x, residual, weight, case[3], dtype)
            expected, expected_scales = quantize_tokens_reference(normed, dtype)
            assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8))
            assert torch.equal(scales, expected_scales)
