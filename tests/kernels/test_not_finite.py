"""Rows that are not finite get the scale NaN from every kernel that quantises, so that the engine sees them.

On a GPU `max` drops NaN, which the interpreter does not: there the same tests run again.
"""

from collections.abc import Callable

import pytest
import torch

from flexjudge_fast.ops.linear_w8a8 import quantize_tokens, quantize_tokens_reference
from flexjudge_fast.ops.rms_norm import add_rms_norm_quantized, rms_norm_quantized
from flexjudge_fast.ops.swiglu import swiglu_quantized

Codes = Callable[[torch.Tensor, torch.dtype], tuple[torch.Tensor, torch.Tensor]]  # of rows [5, 300]


def _of_norm(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return rms_norm_quantized(x, torch.ones_like(x[0]), 1e-6, dtype)


def _of_addition(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    codes, scales, _ = add_rms_norm_quantized(x, torch.zeros_like(x), torch.ones_like(x[0]), 1e-6, dtype)
    return codes, scales


def _of_activation(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return swiglu_quantized(torch.cat((torch.ones_like(x), x), 1), dtype)


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
QUANTIZING = [quantize_tokens, _of_norm, _of_addition, _of_activation]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("quantize", QUANTIZING, ids=lambda f: f.__name__)
def test_their_scale_is_nan(quantize: Codes, dtype: torch.dtype, device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device here")
    if device == "cuda" and dtype == torch.float8_e4m3fn and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no float8")
    whole = torch.randn(5, 300, generator=torch.Generator().manual_seed(0)).to(device)
    x = whole.clone()
    x[0, 7], x[2, 299], x[3, 0] = torch.nan, torch.inf, -torch.inf
    codes, scales = quantize(x, dtype)
    assert scales.isnan().tolist() == [True, False, True, True, False]
    assert (codes.float()[[0, 2, 3]] == 0).all()
    expected, expected_scales = quantize(whole, dtype)
    assert torch.equal(codes.float()[[1, 4]], expected.float()[[1, 4]])
    assert torch.equal(scales[[1, 4]], expected_scales[[1, 4]])


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_the_reference_says_so_too(dtype: torch.dtype) -> None:
    x = torch.tensor([[1.0, torch.nan], [torch.inf, 2.0], [-3.0, 1.0]])
    codes, scales = quantize_tokens_reference(x, dtype)
    assert scales.isnan().tolist() == [True, True, False]
    assert (codes.float()[:2] == 0).all()
