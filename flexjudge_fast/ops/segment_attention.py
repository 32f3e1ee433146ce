"""Softmax attention inside segments, every token to every token: windows and whole frames of an image."""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F  # noqa: N812

from flexjudge_fast.ops.backend import upload, uses_triton
from flexjudge_fast.ops.rotary_embedding import rotary_embedding


@dataclass(frozen=True, eq=False)
class Segments:
    """Where tokens are cut: int64 offsets [num_segments + 1], and the most tokens of a segment."""

    start: torch.Tensor
    longest: int

    @classmethod
    def at(cls, start: torch.Tensor, device: torch.device) -> "Segments":
        """From offsets on the CPU."""
        longest = int(start.diff().max()) if len(start) > 1 else 0
        return cls(upload(start, device), longest)


def segment_attention(
    qkv: torch.Tensor, segments: Segments, cos_sin: tuple[torch.Tensor, torch.Tensor] | None = None
) -> torch.Tensor:
    """Attention without a mask, segment by segment, so that nothing is padded.

    Args:
        qkv: [num_tokens, 3, num_heads, head_dim].
        cos_sin: [num_tokens, head_dim / 2] float32 each, by which queries and keys turn first: in float32,
            rounded to the dtype of `qkv`.

    Returns:
        [num_tokens, num_heads, head_dim]; of tokens outside of all segments, anything.
    """
    if uses_triton(qkv):
        from flexjudge_fast.kernels.segment_attention import segment_attention as kernel

        return kernel(qkv, segments, cos_sin)
    return segment_attention_reference(qkv, segments, cos_sin)


def segment_attention_reference(
    qkv: torch.Tensor, segments: Segments, cos_sin: tuple[torch.Tensor, torch.Tensor] | None = None
) -> torch.Tensor:
    """The same in plain torch; float64 stays float64."""
    query, key, value = qkv.unbind(1)
    if cos_sin is not None:
        wide = torch.promote_types(qkv.dtype, torch.float32)
        query, key = (rotary_embedding(part.to(wide), *cos_sin).to(qkv.dtype) for part in (query, key))
    out = torch.empty_like(query)
    for begin, end in pairwise(segments.start.tolist()):
        q, k, v = (x[begin:end].transpose(0, 1).unsqueeze(0) for x in (query, key, value))
        out[begin:end] = F.scaled_dot_product_attention(q, k, v).squeeze(0).transpose(0, 1)
    return out
