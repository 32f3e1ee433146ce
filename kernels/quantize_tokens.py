"""Quantises activations to 8 bits, each token by its largest magnitude."""

import torch
import triton
import triton.language as tl

from flexjudge_fast.kernels.chips import INTERPRETER, capability
from flexjudge_fast.kernels.codes import limit_of, magnitude, not_nan, round_codes, scale_and_factor
from flexjudge_fast.kernels.tiles import tiles


@triton.jit
def _quantize_tokens_kernel(
    x_ptr,  # [num_tokens, COLUMNS]
    codes_ptr,  # [num_tokens, COLUMNS]
    scales_ptr,  # [num_tokens]
    COLUMNS: tl.constexpr,
    IS_INT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One token: reads it twice (the second time out of the L1) and writes a byte a column."""
    limit = limit_of(IS_INT)
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, COLUMNS, BLOCK):
        x = tl.load(x_ptr + token * COLUMNS + start + column, mask=start + column < COLUMNS, other=0)
        largest = tl.maximum(largest, magnitude(x.to(tl.float32)))
    scale, factor = scale_and_factor(tl.max(largest, 0), IS_INT)
    tl.store(scales_ptr + token, scale)
    for start in range(0, COLUMNS, BLOCK):
        inside = start + column < COLUMNS
        x = tl.load(x_ptr + token * COLUMNS + start + column, mask=inside, other=0).to(tl.float32)
        scaled = tl.minimum(tl.maximum(not_nan(x * factor), -limit), limit)
        codes = round_codes(scaled, IS_INT).to(codes_ptr.dtype.element_ty)
        tl.store(codes_ptr + token * COLUMNS + start + column, codes, mask=inside)


def quantize_tokens(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of each token.

    Args:
        x: [num_tokens, columns], any float dtype.
        dtype: int8 or float8_e4m3fn.

    Returns:
        ([num_tokens, columns] in `dtype`, float32 [num_tokens]).

    Raises:
        ValueError: float8 on a chip that has none.
    """
    check_float8(dtype)
    num_tokens, columns = x.shape
    codes = x.new_empty(num_tokens, columns, dtype=dtype)
    scales = x.new_empty(num_tokens, dtype=torch.float32)
    if num_tokens:
        _quantize_tokens_kernel[(num_tokens,)](
            x.contiguous(),
            codes,
            scales,
            COLUMNS=columns,
            IS_INT=dtype == torch.int8,
            enable_fp_fusion=False,  # a product is rounded before it is rounded to a code
            **tiles("quantize_tokens"),
        )
    return codes, scales


def check_float8(dtype: torch.dtype) -> None:
    """Raises ValueError where `dtype` is float8_e4m3fn and the device has none (the interpreter has)."""
    number = capability()
    if dtype == torch.float8_e4m3fn and INTERPRETER < number < 89:
        raise ValueError(f"float8 (e4m3) needs sm_89 or later; this device is sm_{number}")
