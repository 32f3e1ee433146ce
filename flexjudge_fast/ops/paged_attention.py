"""Causal attention of new tokens over a paged KV cache, prefill and decode in one call."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812

from flexjudge_fast.ops.attention_plan import AttentionPlan
from flexjudge_fast.ops.flash_attention import FlashPlan, flash_attention
from flexjudge_fast.ops.kv_cache import from_kv_rows


def paged_attention(
    query: torch.Tensor,
    cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    plan: AttentionPlan | FlashPlan | None = None,
) -> torch.Tensor:
    """Softmax attention with grouped-query heads (GQA, Ainslie et al. 2023).

    The keys and values of the new tokens are already in the cache. The last query of a sequence sees all
    of its context, the one before it one token less, and so on.

    Args:
        query: [num_tokens, num_heads, head_dim], the new tokens of all sequences, one after the other.
        cache: [2, num_blocks, block_size, num_kv_heads, row_size], as `write_kv` fills it.
        block_tables: [num_seqs, max_blocks] int64; entries past a sequence's context are not read.
        query_start: [num_seqs + 1] int64, offsets into `query`.
        context_lens: [num_seqs] int64, tokens in the cache including the new ones.
        scale: factor on the scores, positive, usually `head_dim ** -0.5`.
        plan: of this step, for the Triton kernels or for flash-attn; plain torch computes without.

    Returns:
        [num_tokens, num_heads, head_dim], dtype of `query`.
    """
    if isinstance(plan, FlashPlan):
        return flash_attention(query, cache, plan, scale)
    if plan is not None:
        from flexjudge_fast.kernels.paged_attention import paged_attention as kernel

        return kernel(query, cache, block_tables, query_start, context_lens, scale, plan)
    return paged_attention_reference(query, cache, block_tables, query_start, context_lens, scale)


def paged_attention_reference(
    query: torch.Tensor,
    cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """`paged_attention` in plain torch. Rows of 8-bit caches hold codes and scale one behind the other."""
    out = torch.empty_like(query)
    block_size = cache.shape[2]
    starts = query_start.tolist()
    for i, context_len in enumerate(context_lens.tolist()):
        start, end = starts[i], starts[i + 1]
        blocks = block_tables[i, : -(-context_len // block_size)]
        rows = cache[:, blocks].flatten(1, 2)[:, :context_len]  # [2, context_len, num_kv_heads, row_size]
        keys, values = from_kv_rows(rows, query.dtype).unbind(0)
        out[start:end] = _attend(query[start:end], keys, values, scale)
    return out


def packed_attention(
    query: torch.Tensor,
    cache: torch.Tensor,
    layer: int,
    block_tables: torch.Tensor,
    query_start: Sequence[int],
    context_lens: Sequence[int],
    scale: float,
    threads: int,
) -> torch.Tensor:
    """`paged_attention` in the compiled kernels, over the cache that `run_decoder` fills.

    Args:
        query: [num_tokens, num_heads, head_dim] float32.
        cache: [num_layers, 2, num_blocks, block_size, num_kv_heads, row_size] float32, float16, bfloat16 or
            int8. Inside a block the elements have the kernels' own order (csrc/include/flexjudge/decoder.h).
        layer: whose keys and values are read.
        block_tables, query_start, context_lens, scale: as for `paged_attention`.

    Returns:
        [num_tokens, num_heads, head_dim] float32. A sequence's bits do not depend on the sequences beside it,
        on how its tokens are cut into steps, nor on `threads`.
    """
    out: torch.Tensor = torch.ops.flexjudge.packed_attention(
        query,
        cache,
        layer,
        block_tables,
        torch.tensor(query_start),
        torch.tensor(context_lens),
        scale,
        threads,
    )
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
