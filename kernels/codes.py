"""Codes of 8 bits (int8 or float8 e4m3) that a kernel makes of float32 values, on any chip alike.

By integer and float32 arithmetic: conversions to float8 exist from sm_89 on only, and differ in how they
round. Kernels that use these are launched with `enable_fp_fusion=False`, so that a product is rounded before
it is rounded to a code.
"""

import torch
import triton
import triton.language as tl


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
def limit_of(IS_INT: tl.constexpr):
    """The largest code."""
    return 127.0 if IS_INT else 448.0


@triton.jit
def magnitude(values):
    """int32 that order as float32 magnitudes do, with infinity and then NaN on top.

    The largest of these is never a number where there is NaN; a GPU's largest of floats would be.
    """
    return values.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def not_nan(values):
    """0 where they are NaN, as is what times the factor of a row that is not finite is."""
    return tl.where(values == values, values, 0.0)


@triton.jit
def scale_and_factor(largest, IS_INT: tl.constexpr):
    """What codes are multiplied by to be values, and values to be codes, by the row's largest `magnitude`.

    Both are 0 for a row of zeros. A row that is not finite has the scale NaN and the factor 0.
    """
    limit = limit_of(IS_INT)
    amax = largest.to(tl.float32, bitcast=True)
    is_finite = largest < 0x7F800000
    has_scale = is_finite & (amax >= 1e-30)  # limit / amax must be finite
    amax = tl.where(has_scale, amax, 1.0)
    scale = tl.where(has_scale, tl.div_rn(amax, limit), tl.where(is_finite, 0.0, float("nan")))
    return scale, tl.where(has_scale, tl.div_rn(limit, amax), 0.0)


@triton.jit
def to_codes(values, IS_INT: tl.constexpr):
    """uint8 bits of the codes nearest to float32 values, half to even, and 0 for NaN.

    What exceeds the range is clamped.
    """
    limit = limit_of(IS_INT)
    rounded = round_codes(tl.minimum(tl.maximum(not_nan(values), -limit), limit), IS_INT)
    if IS_INT:
        return rounded.to(tl.int32).to(tl.uint8)
    bits = rounded.to(tl.int32, bitcast=True)
    sign, magnitude = (bits >> 24) & 0x80, bits & 0x7FFFFFFF
    # Exponents have the bias 7, not 127; below 2^-6 the code counts steps of 2^-9.
    normal = (magnitude >> 20) - (120 << 3)
    small = (tl.abs(rounded) * 512.0).to(tl.int32)
    code = tl.where(magnitude < (121 << 23), small, normal)
    return tl.where(magnitude == 0, 0, code | sign).to(tl.uint8)


def as_bytes(codes: torch.Tensor) -> torch.Tensor:
    """The same memory as uint8, which is what `to_codes` gives."""
    return codes.view(torch.uint8)
