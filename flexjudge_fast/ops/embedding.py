"""Rows of an embedding table, dense or quantised, and of media between them."""

import torch

from flexjudge_fast.ops.backend import uses_triton
from flexjudge_fast.ops.dequantize import dequantize


def embedding(ids: torch.Tensor, table: torch.Tensor, media: torch.Tensor | None = None) -> torch.Tensor:
    """Look up rows.

    Args:
        ids: [num_tokens] int64; with media, those from vocab_size on are rows of `media`.
        table: [vocab_size, hidden].
        media: [num_media, hidden], any float dtype.

    Returns:
        [num_tokens, hidden], dtype of `table`.
    """
    if uses_triton(table):
        from flexjudge_fast.kernels.embedding import embedding as kernel

        return kernel(ids, table, media)
    return embedding_reference(ids, table, media)


def embedding_reference(
    ids: torch.Tensor, table: torch.Tensor, media: torch.Tensor | None = None
) -> torch.Tensor:
    """The same in plain torch."""
    if media is None:
        return table[ids]
    return put_media(table[ids.masked_fill(ids >= len(table), 0)], ids, len(table), media)


def quantized_embedding(
    ids: torch.Tensor,
    blocks: torch.Tensor,
    format_name: str,
    dtype: torch.dtype,
    media: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same from uint8 blocks [vocab_size, bytes_per_row]; only the rows asked for are expanded."""
    if media is None:
        return dequantize(blocks[ids], format_name).to(dtype)
    rows = blocks[ids.masked_fill(ids >= len(blocks), 0)]
    return put_media(dequantize(rows, format_name).to(dtype), ids, len(blocks), media)


def put_media(out: torch.Tensor, ids: torch.Tensor, vocab_size: int, media: torch.Tensor) -> torch.Tensor:
    """`out` [num_tokens, hidden] with the rows of `media` that `ids` ask for, in place."""
    is_media = ids >= vocab_size
    out[is_media] = media[ids[is_media] - vocab_size].to(out.dtype)
    return out
