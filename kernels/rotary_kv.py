"""Turns queries and keys by their tokens' positions, and writes keys and values to the paged cache.

A program takes BLOCK_H heads of one token, all of q, of k or of v; pairs (i, i + head_dim / 2) turn together:

    [BLOCK_H, HALF] first halves, [BLOCK_H, HALF] second halves; cos, sin: [HALF] float32 of the token

It reads 2 * BLOCK_H * HALF elements and writes as many, with 3 operations an element, and 3 more to quantise:
memory sets the pace. All arithmetic is float32, rounded once.
"""

import torch
import triton
import triton.language as tl

from flexjudge_fast.kernels.codes import magnitude, scale_and_factor, to_codes
from flexjudge_fast.kernels.tiles import cdiv, next_power_of_2, tiles
from flexjudge_fast.ops.rotary_kv import RotaryAngles

SCALE_BYTES = 4


@triton.jit
def _table_rows(
    table_ptr,
    positions_ptr,
    token,
    num_tokens,
    pair,  # [BLOCK_H, BLOCK_D]
    HALF: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
):
    """Of a table for each head: pairs below FIRST and SECOND, and the others, by three rows of positions.

    A masked load for each row of positions, as what a load takes must be neighbours in memory. Each head
    reads the row again, out of the L1, as that costs less than to move it between threads.
    """
    at = tl.load(positions_ptr + token)
    row = tl.load(table_ptr + at * HALF + pair, mask=pair < FIRST, other=0)
    if FIRST < HALF:
        at = tl.load(positions_ptr + num_tokens + token)
        row += tl.load(table_ptr + at * HALF + pair, mask=(pair >= FIRST) & (pair < SECOND), other=0)
    if SECOND < HALF:
        at = tl.load(positions_ptr + 2 * num_tokens + token)
        row += tl.load(table_ptr + at * HALF + pair, mask=(pair >= SECOND) & (pair < HALF), other=0)
    return row


@triton.jit
def _store_rows(
    first,  # float32 [BLOCK_H, BLOCK_D]
    second,
    cache_ptr,
    scales_ptr,
    block,  # with side: index into [2 * num_blocks]
    row,  # [BLOCK_H]: index into [block_size, num_kv_heads]
    pair,
    mask,
    ROWS: tl.constexpr,  # block_size * num_kv_heads
    HALF: tl.constexpr,
    KIND: tl.constexpr,
):
    """One token's heads to the cache; NaN and infinity anywhere in a row make its scale NaN."""
    dtype: tl.constexpr = cache_ptr.dtype.element_ty
    if KIND == "float":
        ptrs = cache_ptr + block * (ROWS * 2 * HALF) + (row * 2 * HALF)[:, None] + pair[None, :]
        tl.store(ptrs, first.to(dtype), mask=mask)
        tl.store(ptrs + HALF, second.to(dtype), mask=mask)
    else:
        IS_INT: tl.constexpr = KIND == "int8"
        block_bytes: tl.constexpr = ROWS * (2 * HALF + 4)
        largest = tl.max(tl.maximum(magnitude(first), magnitude(second)), 1)
        scale, factor = scale_and_factor(largest, IS_INT)
        factor = factor[:, None]
        ptrs = cache_ptr + block * block_bytes + (row * 2 * HALF)[:, None] + pair[None, :]
        tl.store(ptrs, to_codes(first * factor, IS_INT), mask=mask)
        tl.store(ptrs + HALF, to_codes(second * factor, IS_INT), mask=mask)
        scale_ptrs = scales_ptr + block * (block_bytes // 4) + ROWS * HALF // 2 + row
        inside = tl.max(mask.to(tl.int32), 1) > 0
        tl.store(scale_ptrs, scale, mask=inside)


@triton.jit(do_not_specialize=["num_tokens", "num_blocks"])
def _rotary_kv_kernel(
    qkv_ptr,  # [num_tokens, HEADS + 2 * KV_HEADS, 2 * HALF]
    cos_ptr,  # [max_len, HALF]
    sin_ptr,
    positions_ptr,  # [1 or 3, num_tokens]
    slots_ptr,  # [num_tokens]
    out_ptr,  # [num_tokens, HEADS, 2 * HALF]
    cache_ptr,  # [2, num_blocks, ...]; uint8 if 8-bit
    scales_ptr,  # the cache as float32
    num_tokens,
    num_blocks,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KIND: tl.constexpr,  # of the cache: "float", "int8" or "fp8"
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    q_tiles: tl.constexpr = (HEADS + BLOCK_H - 1) // BLOCK_H
    kv_tiles: tl.constexpr = (KV_HEADS + BLOCK_H - 1) // BLOCK_H
    # where the tile's part of the heads begins, and how many the part has
    is_query, is_value = tile < q_tiles, tile >= q_tiles + kv_tiles
    start = tl.where(is_query, 0, tl.where(is_value, HEADS + KV_HEADS, HEADS))
    skipped = tl.where(is_query, 0, tl.where(is_value, q_tiles + kv_tiles, q_tiles))
    head = (tile - skipped) * BLOCK_H + tl.arange(0, BLOCK_H)
    pair = tl.arange(0, BLOCK_D)
    mask = (head < tl.where(is_query, HEADS, KV_HEADS))[:, None] & (pair < HALF)[None, :]
    row_size: tl.constexpr = (HEADS + 2 * KV_HEADS) * 2 * HALF
    ptrs = qkv_ptr + token * row_size + ((start + head) * 2 * HALF)[:, None] + pair[None, :]
    first = tl.load(ptrs, mask=mask, other=0).to(tl.float32)
    second = tl.load(ptrs + HALF, mask=mask, other=0).to(tl.float32)
    if not is_value:
        pairs = pair[None, :] + tl.zeros((BLOCK_H, BLOCK_D), tl.int32)
        cos = _table_rows(cos_ptr, positions_ptr, token, num_tokens, pairs, HALF, FIRST, SECOND)
        sin = _table_rows(sin_ptr, positions_ptr, token, num_tokens, pairs, HALF, FIRST, SECOND)
        first, second = first * cos - second * sin, second * cos + first * sin
    if is_query:
        out_ptrs = out_ptr + token * (HEADS * 2 * HALF) + (head * 2 * HALF)[:, None] + pair[None, :]
        tl.store(out_ptrs, first.to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(out_ptrs + HALF, second.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        slot = tl.load(slots_ptr + token)
        mask = mask & (slot >= 0)
        slot = tl.maximum(slot, 0)
        block = slot // BLOCK_SIZE + tl.where(is_value, num_blocks, 0)
        row = (slot % BLOCK_SIZE).to(tl.int32) * KV_HEADS + head
        _store_rows(
            first, second, cache_ptr, scales_ptr, block, row, pair, mask, BLOCK_SIZE * KV_HEADS, HALF, KIND
        )


def rotary_kv(
    qkv: torch.Tensor, angles: RotaryAngles, cache: torch.Tensor, slot_mapping: torch.Tensor
) -> torch.Tensor:
    """See `ops.rotary_kv`. The cache is contiguous; one of 8 bits has 4 bytes more a row, for the scales.

    Raises:
        ValueError: an 8-bit cache whose blocks have codes that do not end at a multiple of 4 bytes.
    """
    num_tokens, all_heads, head_dim = qkv.shape
    _, num_blocks, block_size, num_kv_heads, row_size = cache.shape
    num_heads = all_heads - 2 * num_kv_heads
    out = qkv.new_empty(num_tokens, num_heads, head_dim)
    if not num_tokens:
        return out
    kind = {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}.get(cache.dtype, "float")
    flat = scales = cache.view(-1)
    if kind != "float":
        if block_size * num_kv_heads * head_dim % SCALE_BYTES or row_size != head_dim + SCALE_BYTES:
            raise ValueError(f"an 8-bit cache cannot have the shape {tuple(cache.shape)}")
        flat, scales = flat.view(torch.uint8), flat.view(torch.float32)
    half = head_dim // 2
    sections = angles.sections or (half, 0, 0)
    sizes = tiles("rotary_kv")
    block_h = sizes["BLOCK_H"]
    _rotary_kv_kernel[(num_tokens, cdiv(num_heads, block_h) + 2 * cdiv(num_kv_heads, block_h))](
        qkv.contiguous(),
        angles.cos,
        angles.sin,
        angles.positions.contiguous(),
        slot_mapping,
        out,
        flat,
        scales,
        num_tokens,
        num_blocks,
        HEADS=num_heads,
        KV_HEADS=num_kv_heads,
        HALF=half,
        FIRST=sections[0],
        SECOND=sections[0] + sections[1],
        BLOCK_SIZE=block_size,
        KIND=kind,
        BLOCK_D=next_power_of_2(half),
        enable_fp_fusion=False,
        **sizes,
    )
    return out
