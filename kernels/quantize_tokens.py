"""Quantises activations to 8 bits, each token by its largest magnitude."""

import torch
import triton
import triton.language as tl

from flexjudge_fast.kernels.chips import INTERPRETER, capability
from flexjudge_fast.kernels.tiles import tiles


@triton.jit
def round_codes(values, IS_INT: tl.constexpr):
    """float32 values within the range of int8 or float8 (e4m3), rounded half to even to what the type holds.

    In float32 arithmetic, as conversions differ in how they round (the interpreter's is wrong).
    """
    if IS_INT:
        return (values + 12582912.0) - 12582912.0  # 1.5 * 2^23: the sum's last bit is worth 1
    # the power of two below the value, 2^-6 at least: the format's 3 bits of mantissa follow it
    power = (tl.maximum(values.to(tl.int32, bitcast=True) & 0x7F800000, 121 << 23)).to(
        tl.float32, bitcast=True
    )
    magic = power * 1572864.0  # 1.5 * 2^20
    return (values + magic) - magic


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
    LIMIT: tl.constexpr = 127.0 if IS_INT else 448.0
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, COLUMNS, BLOCK):
        x = tl.load(x_ptr + token * COLUMNS + start + column, mask=start + column < COLUMNS, other=0)
        largest = tl.maximum(largest, tl.abs(x.to(tl.float32)))
    amax = tl.max(largest, 0)
    amax = tl.where(amax < 1e-30, 0.0, amax)  # LIMIT / amax must be finite
    tl.store(scales_ptr + token, tl.div_rn(amax, LIMIT))
    factor = tl.where(amax == 0, 0.0, tl.div_rn(LIMIT, tl.where(amax == 0, 1.0, amax)))
    for start in range(0, COLUMNS, BLOCK):
        inside = start + column < COLUMNS
        x = tl.load(x_ptr + token * COLUMNS + start + column, mask=inside, other=0).to(tl.float32)
        scaled = tl.minimum(tl.maximum(x * factor, -LIMIT), LIMIT)
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
