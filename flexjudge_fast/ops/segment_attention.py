"""Softmax attention inside segments, every token to every token: windows and whole frames of an image."""

from itertools import pairwise

import torch
import torch.nn.functional as F  # noqa: N812


def segment_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, start: torch.Tensor
) -> torch.Tensor:
    """Attention without a mask, segment by segment, so that nothing is padded.

    Args:
        query, key, value: [num_tokens, num_heads, head_dim].
        start: int64 offsets [num_segments + 1].

    Returns:
        [num_tokens, num_heads, head_dim].
    """
    out = torch.empty_like(query)
    bounds = start.tolist()
    for begin, end in pairwise(bounds):
        q, k, v = (x[begin:end].transpose(0, 1).unsqueeze(0) for x in (query, key, value))
        out[begin:end] = F.scaled_dot_product_attention(q, k, v).squeeze(0).transpose(0, 1)
    return out
