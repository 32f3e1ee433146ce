"""`silu(gate) * up`, with or without quantisation to 8 bits by token.

Without, a program takes BLOCK columns of a token, and reads and writes each element once. With, it takes a
whole token and runs over its columns twice, BLOCK at a time: for the largest magnitude, then for the codes;
the second time it reads out of the L1 or L2. Some 6 operations an element: memory sets the pace.
"""

import torch
import triton
import triton.language as tl

from flexjudge_fast.kernels.codes import as_bytes, magnitude, scale_and_factor, to_codes
from flexjudge_fast.kernels.tiles import cdiv, tiles


@triton.jit
def _gated(gate_up_ptr, token, column, SIZE: tl.constexpr):
    """Columns of one token, rounded to the dtype; 0 past the last."""
    # Up to 15 gates too many, which are the first of `up`: the mask would cut loads to what divides SIZE.
    last: tl.constexpr = (SIZE + 15) // 16 * 16 if SIZE >= 16 else SIZE
    row = gate_up_ptr + token * (2 * SIZE)
    gate = tl.load(row + column, mask=column < last, other=0).to(tl.float32)
    up = tl.load(row + SIZE + column, mask=column < SIZE, other=0).to(tl.float32)
    gate = tl.where(column < SIZE, gate, 0.0)
    return (gate / (1.0 + tl.exp(-gate)) * up).to(gate_up_ptr.dtype.element_ty)


@triton.jit
def _swiglu_kernel(
    gate_up_ptr,  # [num_tokens, 2 * SIZE]
    out_ptr,  # [num_tokens, SIZE]
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + token * SIZE + column, _gated(gate_up_ptr, token, column, SIZE), mask=column < SIZE)


@triton.jit
def _swiglu_quantized_kernel(
    gate_up_ptr,  # [num_tokens, 2 * SIZE]
    codes_ptr,  # uint8 [num_tokens, SIZE]
    scales_ptr,  # [num_tokens]
    SIZE: tl.constexpr,
    IS_INT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    largest = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, SIZE, BLOCK):
        values = _gated(gate_up_ptr, token, start + tl.arange(0, BLOCK), SIZE)
        largest = tl.maximum(largest, magnitude(values.to(tl.float32)))
    scale, factor = scale_and_factor(tl.max(largest, 0), IS_INT)
    tl.store(scales_ptr + token, scale)
    for start in range(0, SIZE, BLOCK):
        column = start + tl.arange(0, BLOCK)
        values = _gated(gate_up_ptr, token, column, SIZE).to(tl.float32)
        tl.store(codes_ptr + token * SIZE + column, to_codes(values * factor, IS_INT), mask=column < SIZE)


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """See `ops.swiglu`."""
    num_tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(num_tokens, size)
    sizes = tiles("swiglu")
    if num_tokens:
        _swiglu_kernel[(num_tokens, cdiv(size, sizes["BLOCK"]))](
            gate_up.contiguous(), out, SIZE=size, enable_fp_fusion=False, **sizes
        )
    return out


def swiglu_quantized(gate_up: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """See `ops.swiglu`."""
    num_tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    codes = gate_up.new_empty(num_tokens, size, dtype=dtype)
    scales = gate_up.new_empty(num_tokens, dtype=torch.float32)
    if num_tokens:
        _swiglu_quantized_kernel[(num_tokens,)](
            gate_up.contiguous(),
            as_bytes(codes),
            scales,
            SIZE=size,
            IS_INT=dtype == torch.int8,
            enable_fp_fusion=False,  # the same codes as of `swiglu`, quantised afterwards
            **tiles("swiglu_quantized"),
        )
    return codes, scales
