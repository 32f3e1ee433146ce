"""Prefill attention over the paged KV cache: tiles of new tokens, each over its sequence's chunks in order.

A program has BLOCK_M rows: the (token, head) pairs of one KV head for BLOCK_M // group tokens, so that each
key and value is read once for all of them. It reads 2 * row bytes per position up to its last token's.
"""

import torch
import triton
import triton.language as tl

from flexjudge_fast.kernels.attention_chunk import (
    UNITS,
    attend_chunk,
    load_query,
    merge,
    normalise,
    store_rows,
)
from flexjudge_fast.kernels.attention_sizes import LOG2_E, attention_sizes
from flexjudge_fast.kernels.decode_attention import decode_attention
from flexjudge_fast.ops.attention_plan import AttentionPlan


@triton.jit(do_not_specialize=["table_stride"])
def _prefill_attention_kernel(
    q_ptr,  # [num_tokens, HEADS, HEAD_DIM]
    keys_ptr,
    values_ptr,
    tables_ptr,  # int64 [num_seqs, table_stride]
    tiles_ptr,  # int32 [num_tiles, 4]
    out_ptr,  # as q_ptr
    table_stride,
    scale,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    KV: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    SUM_BY_DOT: tl.constexpr,
    WIDEN_FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    GROUP: tl.constexpr = HEADS // KV_HEADS
    kv_head = tl.program_id(1)
    tile_ptr = tiles_ptr + 4 * tl.program_id(0)
    table_ptr = tables_ptr + tl.load(tile_ptr).to(tl.int64) * table_stride
    count, sees = tl.load(tile_ptr + 2), tl.load(tile_ptr + 3)
    row = tl.arange(0, BLOCK_M)
    valid = row // GROUP < count
    tokens = tl.load(tile_ptr + 1) + row // GROUP
    heads = kv_head * GROUP + row % GROUP
    visible = tl.where(valid, sees + row // GROUP, 0)
    q = load_query(q_ptr, tokens, heads, valid, HEADS, HEAD_DIM, BLOCK_D)
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)  # noqa: E741
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    stop = sees + count - 1
    for start in range(0, stop, CHUNK):
        m_next, l_next, result = attend_chunk(
            q, keys_ptr, values_ptr, table_ptr, visible, start, stop, kv_head, scale,
            BLOCK_SIZE, KV_HEADS, HEAD_DIM, KV, CHUNK,
            BLOCK_M, BLOCK_N, BLOCK_D, PRECISION, SUM_BY_DOT, WIDEN_FIRST,
        )  # fmt: skip
        m, l, acc = merge(m, l, acc, m_next, l_next, result)  # noqa: E741
    # The rows again, by way of a number that only the device knows to be 0: else pointers and masks, which
    # are those of the query, would take registers all the way here.
    row = tl.arange(0, BLOCK_M) + (tl.load(tile_ptr + 2, volatile=True) >> 16)
    tokens = tl.load(tile_ptr + 1, volatile=True) + row // GROUP
    heads = kv_head * GROUP + row % GROUP
    valid = row // GROUP < count
    store_rows(out_ptr, normalise(l, acc), tokens, heads, valid, HEADS, HEAD_DIM, BLOCK_D)


def paged_attention(
    query: torch.Tensor,
    cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    plan: AttentionPlan | None = None,
) -> torch.Tensor:
    """`ops.paged_attention` on a device: sequences with one new token are decoded, others are prefill.

    Args:
        query: [num_tokens, num_heads, head_dim], bfloat16, float16 or float32.
        cache: [2, num_blocks, block_size, num_kv_heads, row_size]; 8-bit ones in split blocks.
        block_tables: [num_seqs, max_blocks] int64.
        query_start, context_lens: not read, as the plan was made of them.
        scale: factor on the scores, positive.
        plan: of this step.

    Returns:
        [num_tokens, num_heads, head_dim], dtype of `query`. No sequence's bits depend on those beside it.

    Raises:
        ValueError: no plan, or no kernel for these sizes.
    """
    if plan is None:
        raise ValueError("attention kernels need a plan, see flexjudge_fast.ops.attention_plan")
    query = query.contiguous()
    out = torch.empty_like(query)
    keys, values = _sides(cache)
    kv_heads = cache.shape[3]
    sizes = attention_sizes(
        query.dtype, cache.dtype, cache.shape[2], query.shape[1], kv_heads, query.shape[2]
    )
    if plan.cut not in (sizes.cut, sizes.shared_cut):
        raise ValueError(f"the plan is for {plan.cut}, the kernels for {sizes.cut} or {sizes.shared_cut}")
    arguments = (query, keys, values, block_tables)
    last = (out, block_tables.stride(0), scale * LOG2_E * UNITS.get(str(sizes.common["KV"]), 1.0))
    if plan.has_decode:
        decode_attention(*arguments, *last, plan, sizes)
    if len(plan.tiles):
        _prefill_attention_kernel[(len(plan.tiles), kv_heads)](
            *arguments, plan.tiles, *last, **sizes.common, **sizes.prefill
        )
    return out


def _sides(cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values; 8-bit codes as plain bytes."""
    if cache.dtype.itemsize == 1:
        cache = cache.view(torch.uint8)
    return cache[0], cache[1]
