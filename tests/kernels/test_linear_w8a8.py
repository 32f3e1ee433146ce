"""8-bit products and quantisation by token: against float64 and exact integers, and bits in any batch."""

from collections.abc import Iterator

import pytest
import torch

from flexjudge_fast.ops.linear_w8a8 import (
    W8Matrix,
    dequantize_w8,
    linear_w8a8,
    linear_w8a8_reference,
    quantize_tokens,
    quantize_tokens_reference,
    repack_w8,
)
from tests.interpreted import SWEEP, add_in_order, in_nan

NUM_CASES = 200 * SWEEP
NUM_PARTS = 10
TOKENS = (0, 1, 2, 15, 16, 17, 33, 64, 65, 130)
DTYPES = [torch.int8, torch.float8_e4m3fn]


@pytest.fixture
def in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    add_in_order(monkeypatch)


def _cases(part: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Generator]]:
    """Activations [tokens, columns], a dense weight and a bias; some rows of either are zeros."""
    for seed in range(part, NUM_CASES, NUM_PARTS):
        g = torch.Generator().manual_seed(seed)
        sizes = torch.randint(0, 1 << 30, (3,), generator=g).tolist()
        tokens = TOKENS[seed // NUM_PARTS % len(TOKENS)]
        rows = (1, 3, 63, 64, 65, 129, 200)[sizes[0] % 7]
        columns = (1, 16, 31, 32, 33, 64, 100, 256)[sizes[1] % 8]
        magnitude = (1e-20, 1e-4, 1.0, 1e4)[sizes[2] % 4]
        x = torch.randn(tokens, columns, generator=g) * magnitude
        x *= (torch.rand(tokens, 1, generator=g) > 0.1) * torch.rand(tokens, 1, generator=g)
        weight = torch.randn(rows, columns, generator=g) * (torch.rand(rows, 1, generator=g) > 0.1)
        yield x, weight, torch.randn(rows, generator=g) if seed % 2 else None, g


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("part", range(NUM_PARTS))
def test_products_match_float64(part: int, dtype: torch.dtype) -> None:
    for x, dense, bias, _ in _cases(part):
        weight = repack_w8(dense, dtype)
        codes, scales = quantize_tokens_reference(x, dtype)
        moved = W8Matrix(in_nan(weight.codes), in_nan(weight.scales))
        padded_bias = None if bias is None else in_nan(bias)
        out = linear_w8a8(in_nan(codes), in_nan(scales), moved, padded_bias, torch.float32)
        if dtype == torch.int8:  # exact but for the order of two products
            assert torch.equal(out, linear_w8a8_reference(codes, scales, weight, bias, torch.float32))
        expected = linear_w8a8_reference(codes, scales, weight, bias, torch.float64)
        assert out.shape == expected.shape
        assert torch.isfinite(out).all()
        if out.numel():
            error = (out.double() - expected).abs().amax(1)
            assert (error <= 1e-3 * expected.abs().amax(1)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("part", range(NUM_PARTS))
def test_codes_and_scales_are_those_of_the_reference(part: int, dtype: torch.dtype) -> None:
    for i, (wide, _, _, _) in enumerate(_cases(part)):
        x = wide[:33].half() if i % 2 else wide[:33]  # a program a token
        codes, scales = quantize_tokens(in_nan(x), dtype)
        expected, expected_scales = quantize_tokens_reference(x, dtype)
        assert torch.equal(codes.view(torch.int8), expected.view(torch.int8))
        assert torch.equal(scales, expected_scales)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounds_half_to_even(dtype: torch.dtype) -> None:
    limit = 127.0 if dtype == torch.int8 else 448.0
    ties = torch.tensor([0.5, 1.5, 2.5, -0.5, -2.5, 17.0, 19.0, 2.0**-10, 3 * 2.0**-10, 0.0, limit])
    codes, scales = quantize_tokens(ties.unsqueeze(0), dtype)
    assert torch.equal(codes.float()[0], ties.round() if dtype == torch.int8 else ties.to(dtype).float())
    assert scales.tolist() == [1.0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extremes(dtype: torch.dtype) -> None:
    x = torch.tensor([[0.0, 0.0], [1e-38, -1e-40], [3e38, -1e38], [-65504.0, 1e-8], [1e-29, 0.0]])
    codes, scales = quantize_tokens(x, dtype)
    assert torch.isfinite(codes.float()).all()
    assert (codes.float()[:2] == 0).all()
    assert (scales[:2] == 0).all()
    torch.testing.assert_close(codes.float()[2:, 0] * scales[2:], x[2:, 0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_are_close_to_what_they_were(dtype: torch.dtype) -> None:
    weight = torch.randn(5000, 40)
    weight[7] = 0
    step = 1 / 254 if dtype == torch.int8 else 1 / 16
    error = (dequantize_w8(repack_w8(weight, dtype)) - weight).abs()
    assert (error <= 1.001 * step * weight.abs().amax(1, keepdim=True)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_has_the_same_bits_in_any_batch(in_order: None, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(1)
    weight = repack_w8(torch.randn(70, 256, generator=g), dtype)
    codes, scales = quantize_tokens(torch.randn(130, 256, generator=g), dtype)
    bias = torch.randn(70, generator=g)
    batch = linear_w8a8(codes, scales, weight, bias, torch.float32)
    for first, last in ((0, 1), (0, 2), (0, 16), (0, 17), (0, 33), (0, 65), (77, 78)):
        alone = linear_w8a8(codes[first:last], scales[first:last], weight, bias, torch.float32)
        assert torch.equal(alone, batch[first:last])


def test_float8_needs_a_chip_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexjudge_fast.kernels.quantize_tokens.capability", lambda: 86)
    with pytest.raises(ValueError, match="sm_89 or later; this device is sm_86"):
        quantize_tokens(torch.ones(1, 16), torch.float8_e4m3fn)
    codes, scales = quantize_tokens_reference(torch.ones(1, 16), torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="sm_89 or later; this device is sm_86"):
        linear_w8a8(codes, scales, repack_w8(torch.ones(2, 16), torch.float8_e4m3fn))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("part", range(NUM_PARTS))
def test_on_a_gpu_in_bfloat16(part: int, dtype: torch.dtype) -> None:
    if dtype == torch.float8_e4m3fn and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no float8")
    for x, dense, bias, _ in _cases(part):
        weight = repack_w8(dense, dtype).to(torch.device("cuda"))
        codes, scales = quantize_tokens(in_nan(x.bfloat16(), "cuda"), dtype)
        known = quantize_tokens_reference(x.bfloat16(), dtype)
        assert torch.equal(codes.cpu().view(torch.int8), known[0].view(torch.int8))
        some_bias = None if bias is None else in_nan(bias.bfloat16(), "cuda")
        out = linear_w8a8(codes, scales, weight, some_bias)
        expected = linear_w8a8_reference(codes, scales, weight, some_bias, torch.float64)
        if out.numel():
            error = (out.double() - expected).abs().amax(1)
            assert (error <= 5e-3 * expected.abs().amax(1)).all()  # a bfloat16 result is rounded by 2^-9
            assert torch.equal(linear_w8a8(codes[:1], scales[:1], weight, some_bias), out[:1])
