"""RMS norm of each token, alone or behind the residual addition, with or without quantisation to 8 bits.

One program takes a token, whose row it holds in registers: `BLOCK` columns, the next power of two. It reads
each input once and writes each result once; some 6 operations an element, so memory sets the pace.
"""

import torch
import triton
import triton.language as tl

from flexjudge_fast.kernels.codes import as_bytes, magnitude, scale_and_factor, to_codes
from flexjudge_fast.kernels.tiles import next_power_of_2, tiles


@triton.jit
def _rms_norm_kernel(
    x_ptr,  # [num_tokens, HIDDEN]
    residual_ptr,  # [num_tokens, HIDDEN]
    weight_ptr,  # [HIDDEN]
    total_ptr,  # [num_tokens, HIDDEN]
    out_ptr,  # [num_tokens, HIDDEN], uint8 if quantised
    scales_ptr,  # [num_tokens]
    eps,
    HIDDEN: tl.constexpr,
    ADDS: tl.constexpr,
    QUANTIZES: tl.constexpr,
    IS_INT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < HIDDEN
    x = tl.load(x_ptr + token * HIDDEN + column, mask=inside, other=0)
    dtype: tl.constexpr = x.dtype
    if ADDS:
        residual = tl.load(residual_ptr + token * HIDDEN + column, mask=inside, other=0)
        x = (residual.to(tl.float32) + x.to(tl.float32)).to(dtype)
        tl.store(total_ptr + token * HIDDEN + column, x, mask=inside)
    weight = tl.load(weight_ptr + column, mask=inside, other=0).to(tl.float32)
    wide = x.to(tl.float32)
    mean = tl.sum(wide * wide, 0) / HIDDEN
    normed = (wide * tl.div_rn(1.0, tl.sqrt_rn(mean + eps))).to(dtype)
    out = (normed.to(tl.float32) * weight).to(dtype)
    if QUANTIZES:
        values = out.to(tl.float32)
        scale, factor = scale_and_factor(tl.max(magnitude(values), 0), IS_INT)
        tl.store(scales_ptr + token, scale)
        tl.store(out_ptr + token * HIDDEN + column, to_codes(values * factor, IS_INT), mask=inside)
    else:
        tl.store(out_ptr + token * HIDDEN + column, out, mask=inside)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See `ops.rms_norm`."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _launch(x, None, weight, eps, out, None, None)
    return out


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `ops.rms_norm`."""
    out, total = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))
    _launch(x, residual, weight, eps, out, total, None)
    return out, total


def rms_norm_quantized(
    x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `ops.rms_norm`."""
    codes, scales = x.new_empty(x.shape, dtype=dtype), x.new_empty(len(x), dtype=torch.float32)
    _launch(x, None, weight, eps, codes, None, scales)
    return codes, scales


def add_rms_norm_quantized(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `ops.rms_norm`."""
    codes, scales = x.new_empty(x.shape, dtype=dtype), x.new_empty(len(x), dtype=torch.float32)
    total = torch.empty_like(x, memory_format=torch.contiguous_format)
    _launch(x, residual, weight, eps, codes, total, scales)
    return codes, scales, total


def _launch(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor,
    total: torch.Tensor | None,
    scales: torch.Tensor | None,
) -> None:
    """Fills `out`, and those of `total` and `scales` that are there."""
    num_tokens, hidden = x.shape
    if not num_tokens:
        return
    _rms_norm_kernel[(num_tokens,)](
        x.contiguous(),
        x if residual is None else residual.contiguous(),
        weight,
        x if total is None else total,
        out if scales is None else as_bytes(out),
        x if scales is None else scales,
        eps,
        HIDDEN=hidden,
        ADDS=residual is not None,
        QUANTIZES=scales is not None,
        IS_INT=out.dtype == torch.int8,
        BLOCK=next_power_of_2(hidden),
        enable_fp_fusion=False,  # the same codes as of a norm that is quantised afterwards
        **tiles("rms_norm", "wide" if hidden > 4096 else ""),
    )
