"""Gathers the embeddings of tokens: rows of the table, and of media where ids exceed the vocabulary.

A program takes BLOCK columns of a token: one load, one store; no arithmetic.
"""

import torch
import triton
import triton.language as tl

from flexjudge_fast.kernels.tiles import cdiv, tiles


@triton.jit
def _embedding_kernel(
    ids_ptr,  # [num_tokens]
    table_ptr,  # [VOCAB, HIDDEN]
    media_ptr,  # [num_media, HIDDEN]
    out_ptr,  # [num_tokens, HIDDEN]
    VOCAB: tl.constexpr,
    HIDDEN: tl.constexpr,
    HAS_MEDIA: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < HIDDEN
    row = tl.load(ids_ptr + token)
    if HAS_MEDIA:
        is_media = row >= VOCAB
        x = tl.load(table_ptr + row * HIDDEN + column, mask=inside & (row < VOCAB), other=0)
        media = tl.load(media_ptr + (row - VOCAB) * HIDDEN + column, mask=inside & is_media, other=0)
        x = tl.where(is_media, media.to(x.dtype), x)
    else:
        x = tl.load(table_ptr + row * HIDDEN + column, mask=inside, other=0)
    tl.store(out_ptr + token * HIDDEN + column, x, mask=inside)


def embedding(ids: torch.Tensor, table: torch.Tensor, media: torch.Tensor | None = None) -> torch.Tensor:
    """See `ops.embedding`."""
    num_tokens, (vocab, hidden) = len(ids), table.shape
    out = table.new_empty(num_tokens, hidden)
    sizes = tiles("embedding")
    if num_tokens:
        _embedding_kernel[(num_tokens, cdiv(hidden, sizes["BLOCK"]))](
            ids,
            table,
            table if media is None else media.contiguous(),
            out,
            VOCAB=vocab,
            HIDDEN=hidden,
            HAS_MEDIA=media is not None,
            **sizes,
        )
    return out
