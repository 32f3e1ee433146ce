"""Rotary position embedding (Su et al. 2021) in the half-split layout of Llama and Qwen2."""

import torch


def rotary_embedding(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (i, i + head_dim / 2) of every head.

    Args:
        x: [num_tokens, num_heads, head_dim].
        cos, sin: [num_tokens, head_dim / 2], the dtype of `x`.

    Returns:
        A new tensor of the shape and dtype of `x`.
    """
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # [num_tokens, 1, head_dim / 2]
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
