"""RMS normalisation, alone and fused with the residual addition and with quantisation by token."""

import torch

from flexjudge_fast.ops.backend import uses_triton
from flexjudge_fast.ops.linear_w8a8 import quantize_tokens_reference


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Root mean square norm (Zhang & Sennrich 2019, eq. 4), the mean taken in float32.

    Args:
        x: [num_tokens, hidden], any float dtype.
        weight: [hidden], same dtype as `x`.
        eps: added to the mean square.

    Returns:
        [num_tokens, hidden], dtype of `x`.
    """
    if uses_triton(x):
        from flexjudge_fast.kernels.rms_norm import rms_norm as kernel

        return kernel(x, weight, eps)
    return rms_norm_reference(x, weight, eps)


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The same in plain torch; float64 stays float64."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`residual + x`, and its RMS norm. Returns `(normed, sum)`, both [num_tokens, hidden]."""
    if uses_triton(x):
        from flexjudge_fast.kernels.rms_norm import add_rms_norm as kernel

        return kernel(x, residual, weight, eps)
    return add_rms_norm_reference(x, residual, weight, eps)


def add_rms_norm_reference(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in plain torch."""
    total = residual + x
    return rms_norm_reference(total, weight, eps), total


def rms_norm_quantized(
    x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rms_norm`, each token quantised as `quantize_tokens` does it.

    Args:
        dtype: int8 or float8_e4m3fn.

    Returns:
        Codes [num_tokens, hidden] in `dtype`; float32 scales [num_tokens].
    """
    if uses_triton(x):
        from flexjudge_fast.kernels.rms_norm import rms_norm_quantized as kernel

        return kernel(x, weight, eps, dtype)
    return quantize_tokens_reference(rms_norm_reference(x, weight, eps), dtype)


def add_rms_norm_quantized(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`add_rms_norm`, the norm quantised as `quantize_tokens` does it. Returns `(codes, scales, sum)`."""
    if uses_triton(x):
        from flexjudge_fast.kernels.rms_norm import add_rms_norm_quantized as kernel

        return kernel(x, residual, weight, eps, dtype)
    normed, total = add_rms_norm_reference(x, residual, weight, eps)
    return *quantize_tokens_reference(normed, dtype), total
