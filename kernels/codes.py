"""Codes of 8 bits (int8 or float8 e4m3) that a kernel makes of float32 values, on any chip alike.

By integer and float32 arithmetic: conversions to float8 exist from sm_89 on only, and differ in how they
round. Kernels that use these are launched with `enable_fp_fusion=False`, so that a product is rounded before
it is rounded to a code.
"""

import torch
import triton
import triton.language as tl

from flexjudge_fast.kernels.quantize_tokens import round_codes


@triton.jit
def limit_of(IS_INT: tl.constexpr):
    """The largest code."""
    return 127.0 if IS_INT else 448.0


@triton.jit
def scale_and_factor(amax, IS_INT: tl.constexpr):
    """What codes are multiplied by to be values, and values to be codes; both are 0 for a row of zeros."""
    limit = limit_of(IS_INT)
    amax = tl.where(amax < 1e-30, 0.0, amax)  # limit / amax must be finite
    factor = tl.where(amax == 0, 0.0, tl.div_rn(limit, tl.where(amax == 0, 1.0, amax)))
    return tl.div_rn(amax, limit), factor


@triton.jit
def to_codes(values, IS_INT: tl.constexpr):
    """uint8 bits of the codes nearest to float32 values, half to even; what exceeds the range is clamped."""
    limit = limit_of(IS_INT)
    rounded = round_codes(tl.minimum(tl.maximum(values, -limit), limit), IS_INT)
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
