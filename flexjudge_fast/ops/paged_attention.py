"""Causal attention of new tokens over a paged KV cache, prefill and decode in one call."""

import torch
import torch.nn.functional as F  # noqa: N812


def paged_attention(
    query: torch.Tensor,
    cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_start: list[int],
    context_lens: list[int],
    scale: float,
) -> torch.Tensor:
    """Softmax attention with grouped-query heads (GQA, Ainslie et al. 2023).

    The keys and values of the new tokens are already in the cache. The last query of a sequence sees all
    of its context, the one before it one token less, and so on.

    Args:
        query: [num_tokens, num_heads, head_dim], the new tokens of all sequences, one after the other.
        cache: [2, num_blocks, block_size, num_kv_heads, head_dim].
        block_tables: [num_seqs, max_blocks] int64; entries past a sequence's context are not read.
        query_start: `num_seqs + 1` offsets into `query`.
        context_lens: per sequence, tokens in the cache including the new ones.
        scale: factor on the scores, usually `head_dim ** -0.5`.

    Returns:
        [num_tokens, num_heads, head_dim], dtype of `query`.
    """
    out = torch.empty_like(query)
    block_size = cache.shape[2]
    for i, context_len in enumerate(context_lens):
        start, end = query_start[i], query_start[i + 1]
        blocks = block_tables[i, : -(-context_len // block_size)]
        keys, values = cache[:, blocks].flatten(1, 2)[:, :context_len].unbind(0)
        out[start:end] = _attend(query[start:end], keys.to(query.dtype), values.to(query.dtype), scale)
    return out


def _attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
    """One sequence: query [new, num_heads, head_dim] over keys/values [context, num_kv_heads, head_dim]."""
    num_new, context_len = query.shape[0], keys.shape[0]
    mask = None
    if num_new > 1:
        mask = torch.ones(num_new, context_len, dtype=torch.bool, device=query.device)
        mask = mask.tril(diagonal=context_len - num_new)
    out = F.scaled_dot_product_attention(
        query.transpose(0, 1).unsqueeze(0),
        keys.transpose(0, 1).unsqueeze(0),
        values.transpose(0, 1).unsqueeze(0),
        attn_mask=mask,
        scale=scale,
        enable_gqa=query.shape[1] != keys.shape[1],
    )
    return out.squeeze(0).transpose(0, 1)
