"""The gated activation against float64, and its codes, to the bit."""

from collections.abc import Iterator

import pytest
import torch

from flexjudge_fast.ops.linear_w8a8 import quantize_tokens_reference
from flexjudge_fast.ops.swiglu import swiglu, swiglu_quantized, swiglu_reference
from tests.interpreted import SWEEP, in_nan, rows_close

NUM_CASES = 200 * SWEEP
NUM_PARTS = 4
SIZES = (1, 5, 16, 36, 63, 64, 65, 128, 200, 256)
CODES = (torch.int8, torch.float8_e4m3fn)


def _cases(part: int) -> Iterator[torch.Tensor]:
    for seed in range(part, NUM_CASES, NUM_PARTS):
        g = torch.Generator().manual_seed(seed)
        tokens, size = (0, 1, 2, 5, 9)[seed // 4 % 5], SIZES[seed // 2 % len(SIZES)]
        scale = 10.0 ** float(torch.randint(-2, 3, (1,), generator=g))  # gates of hundreds, too
        gate_up = torch.randn(tokens, 2, size, generator=g) * torch.tensor([[scale], [1.0]])
        gate_up[torch.rand(tokens, generator=g) < 0.1] = 0
        yield gate_up.flatten(1).to((torch.float16, torch.float32)[seed % 2])


@pytest.mark.parametrize("part", range(NUM_PARTS))
def test_matches_float64(part: int) -> None:
    for gate_up in _cases(part):
        out = swiglu(in_nan(gate_up))
        assert out.dtype == gate_up.dtype
        assert rows_close(out, swiglu_reference(gate_up.double()), 1e-3)


@pytest.mark.parametrize("part", range(NUM_PARTS))
def test_codes_are_those_of_the_activation(part: int) -> None:
    for i, gate_up in enumerate(_cases(part)):
        dtype = CODES[i % 2]
        codes, scales = swiglu_quantized(in_nan(gate_up), dtype)
        expected, expected_scales = quantize_tokens_reference(swiglu(gate_up), dtype)
        assert codes.dtype == dtype
        assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8))
        assert torch.equal(scales, expected_scales)


def test_a_token_has_the_same_bits_in_any_batch() -> None:
    gate_up = torch.randn(30, 400, generator=torch.Generator().manual_seed(1)).half()
    out, (codes, scales) = swiglu(gate_up), swiglu_quantized(gate_up, torch.int8)
    for i in (0, 13, 29):
        one = gate_up[i : i + 1]
        assert torch.equal(swiglu(one)[0], out[i])
        assert torch.equal(swiglu_quantized(one, torch.int8)[0][0], codes[i])
        assert torch.equal(swiglu_quantized(one, torch.int8)[1][0], scales[i])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("part", range(NUM_PARTS))
def test_on_a_gpu_in_bfloat16(part: int) -> None:
    for case in _cases(part):
        gate_up = in_nan(case.bfloat16(), "cuda")
        out = swiglu(gate_up)
        assert rows_close(out, swiglu_reference(gate_up.double()), 5e-3)
        for dtype in CODES:
            codes, scales = swiglu_quantized(gate_up, dtype)
            expected, expected_scales = quantize_tokens_reference(out, dtype)
            assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8))
            assert torch.equal(scales, expected_scales)
