"""RMS normalisation, alone and fused with the residual addition."""

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Root mean square norm (Zhang & Sennrich 2019, eq. 4), the mean taken in float32.

    Args:
        x: [num_tokens, hidden], any float dtype.
        weight: [hidden], same dtype as `x`.
        eps: added to the mean square.

    Returns:
        [num_tokens, hidden], dtype of `x`.
    """
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`residual + x`, and its RMS norm. Returns `(normed, sum)`, both [num_tokens, hidden]."""
    total = residual + x
    return rms_norm(total, weight, eps), total
