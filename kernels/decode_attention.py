"""Decode attention over the paged KV cache: a program for each chunk, and a kernel that merges them in order.

An item is a chunk of one sequence, or of several that have its blocks in common (forked samples, judgements
under one rubric). Its BLOCK_M rows are (sequence, head) pairs of one KV head, all on each key and value:

    (items, KV heads)  programs read CHUNK * 2 * row bytes, write a result and 8 bytes per (sequence, head)
    (sequences, heads) programs read those and write the result
"""

import torch
import triton
import triton.language as tl

from flexjudge_fast.kernels.attention_chunk import (
    attend_chunk,
    load_query,
    merge,
    normalise,
    store_rows,
)
from flexjudge_fast.kernels.attention_sizes import Sizes
from flexjudge_fast.kernels.tiles import cdiv, tiles
from flexjudge_fast.ops.attention_plan import AttentionPlan


@triton.jit(do_not_specialize=["table_stride"])
def _decode_attention_kernel(
    q_ptr,  # [num_tokens, HEADS, HEAD_DIM]
    keys_ptr,
    values_ptr,
    tables_ptr,  # int64 [num_seqs, table_stride]
    items_ptr,  # int32 [num_items, 4]
    order_ptr,  # int32 [num_partials, 4]
    stats_ptr,  # float32 [num_partials, HEADS, 2]: maximum and sum
    results_ptr,  # [num_partials, HEADS, HEAD_DIM], dtype of the query
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
    item_ptr = items_ptr + 4 * tl.program_id(0)
    first, count, start = tl.load(item_ptr), tl.load(item_ptr + 1), tl.load(item_ptr + 2) * CHUNK
    if count == 0:
        return
    row = tl.arange(0, BLOCK_M)
    valid = row // GROUP < count
    heads = kv_head * GROUP + row % GROUP
    entries = order_ptr + 4 * (first + row // GROUP)
    tokens = tl.load(entries + 1, mask=valid, other=0)
    visible = tl.load(entries + 2, mask=valid, other=0)
    table_ptr = tables_ptr + tl.load(order_ptr + 4 * first).to(tl.int64) * table_stride
    q = load_query(q_ptr, tokens, heads, valid, HEADS, HEAD_DIM, BLOCK_D)
    # A chunk that sequences share lies within each of their contexts.
    m, l, result = attend_chunk(  # noqa: E741
        q, keys_ptr, values_ptr, table_ptr, visible, start, tl.max(visible, 0), kv_head, scale,
        BLOCK_SIZE, KV_HEADS, HEAD_DIM, KV, CHUNK,
        BLOCK_M, BLOCK_N, BLOCK_D, PRECISION, SUM_BY_DOT, WIDEN_FIRST,
    )  # fmt: skip
    # As in prefill, the rows again, by way of a number that only the device knows to be 0.
    row = tl.arange(0, BLOCK_M) + (tl.load(item_ptr + 1, volatile=True) >> 16)
    heads = kv_head * GROUP + row % GROUP
    valid = row // GROUP < count
    partials = tl.load(order_ptr + 4 * (first + row // GROUP) + 3, mask=valid, other=0)
    stats = stats_ptr + (partials.to(tl.int64) * HEADS + heads) * 2
    tl.store(stats, m, mask=valid)
    tl.store(stats + 1, l, mask=valid)
    store_rows(results_ptr, result, partials, heads, valid, HEADS, HEAD_DIM, BLOCK_D)


@triton.jit
def _merge_chunks_kernel(
    stats_ptr,  # as above
    results_ptr,
    merges_ptr,  # int32 [num_seqs, 4]
    out_ptr,  # [num_tokens, HEADS, HEAD_DIM]
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,  # heads of a program
):
    merge_ptr = merges_ptr + 4 * tl.program_id(0)
    token, first, count = tl.load(merge_ptr), tl.load(merge_ptr + 1), tl.load(merge_ptr + 2)
    if token < 0:
        return
    none = tl.zeros((BLOCK_H,), tl.int32)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    valid = head < HEADS
    m = tl.full((BLOCK_H,), float("-inf"), tl.float32)
    l = tl.zeros((BLOCK_H,), tl.float32)  # noqa: E741
    acc = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
    for partial in range(first, first + count):
        stats = stats_ptr + ((partial + none).to(tl.int64) * HEADS + head) * 2
        result = load_query(results_ptr, partial + none, head, valid, HEADS, HEAD_DIM, BLOCK_D)
        m_next = tl.load(stats, mask=valid, other=float("-inf"))
        l_next = tl.load(stats + 1, mask=valid, other=0)
        m, l, acc = merge(m, l, acc, m_next, l_next, result)  # noqa: E741
    store_rows(out_ptr, normalise(l, acc), token + none, head, valid, HEADS, HEAD_DIM, BLOCK_D)


def decode_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    block_tables: torch.Tensor,
    out: torch.Tensor,
    table_stride: int,
    scale: float,
    plan: AttentionPlan,
    sizes: Sizes,
) -> None:
    """Fill the rows of `out` that belong to the plan's decoded sequences.

    Args:
        query, out: [num_tokens, num_heads, head_dim].
        keys, values: [num_blocks, block_size, num_kv_heads, row_size], 8-bit ones as uint8 in split blocks.
        scale: with log2(e) and the codes' unit.
    """
    _, heads, head_dim = query.shape
    constants = sizes.decode if plan.cut == sizes.cut else sizes.shared
    num_partials = len(plan.order)
    stats = query.new_empty(num_partials, heads, 2, dtype=torch.float32)
    results = query.new_empty(num_partials, heads, head_dim)
    if num_partials:
        _decode_attention_kernel[(len(plan.items), keys.shape[2])](
            query, keys, values, block_tables, plan.items, plan.order, stats, results, table_stride, scale,
            **sizes.common, **constants,
        )  # fmt: skip
    merging = tiles("attention_merge")
    _merge_chunks_kernel[(len(plan.merges), cdiv(heads, merging["BLOCK_H"]))](
        stats, results, plan.merges, out,
        HEADS=heads, HEAD_DIM=head_dim, BLOCK_D=sizes.common["BLOCK_D"], **merging,
    )  # fmt: skip
