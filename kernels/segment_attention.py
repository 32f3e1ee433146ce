"""Attention of every token of a segment to every other, queries and keys turned as they are read.

A program takes BLOCK_M queries of a segment and a head, and runs over its keys BLOCK_N at a time:

    scores [BLOCK_M, BLOCK_N] = first halves q . k + second halves q . k   (pairs i, i + HALF turn together)
    out [BLOCK_M, head_dim] += softmax(scores) . v

What is not a power of two is cut, not padded: a half of 40 into 32 + 8 (multiplied as 16), values of 80 into
64 + 16. A step reads 2 * BLOCK_N * head_dim elements (and as many bytes * 4 / 2 of cos and sin) and does
4 * BLOCK_M * BLOCK_N * head_dim operations. One size of tiles for all segments, and keys in order from the
segment's first: a segment's bits are the same in any company.
"""

import torch
import triton
import triton.language as tl

from flexjudge_fast.kernels.tiles import tiles
from flexjudge_fast.ops.segment_attention import Segments

LOG2_E = 1.4426950408889634


@triton.jit
def _load_halves(
    ptr,  # of the segment's first token, this head
    cos_ptr,  # of the segment's first token
    sin_ptr,
    row,  # [ROWS], counted from there
    count,  # of rows that exist
    ROW_SIZE: tl.constexpr,
    HALF: tl.constexpr,
    FROM: tl.constexpr,
    SIZE: tl.constexpr,
    TURNS: tl.constexpr,
):
    """Columns FROM to FROM + SIZE of both halves, [ROWS, SIZE] each; zeros where there are none."""
    column = FROM + tl.arange(0, SIZE)
    mask = (row < count)[:, None]
    if FROM + SIZE > HALF:
        mask = mask & (column < HALF)[None, :]
    ptrs = ptr + row[:, None] * ROW_SIZE + column[None, :]
    first, second = tl.load(ptrs, mask=mask, other=0), tl.load(ptrs + HALF, mask=mask, other=0)
    if TURNS:
        angles = row[:, None] * HALF + column[None, :]
        cos = tl.load(cos_ptr + angles, mask=mask, other=0)
        sin = tl.load(sin_ptr + angles, mask=mask, other=0)
        x, y = first.to(tl.float32), second.to(tl.float32)
        first = (x * cos - y * sin).to(first.dtype)
        second = (y * cos + x * sin).to(second.dtype)
    return first, second


@triton.jit
def _load_columns(
    ptr,
    row,
    count,
    ROW_SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    FROM: tl.constexpr,
    SIZE: tl.constexpr,
):
    """[ROWS, SIZE] of values, zeros where there are none."""
    column = FROM + tl.arange(0, SIZE)
    mask = (row < count)[:, None]
    if FROM + SIZE > COLUMNS:
        mask = mask & (column < COLUMNS)[None, :]
    return tl.load(ptr + row[:, None] * ROW_SIZE + column[None, :], mask=mask, other=0)


@triton.jit
def _store_columns(ptr, x, row, count, ROW_SIZE: tl.constexpr, COLUMNS: tl.constexpr, FROM: tl.constexpr):
    column = FROM + tl.arange(0, x.shape[1])
    mask = (row < count)[:, None] & (column < COLUMNS)[None, :]
    tl.store(ptr + row[:, None] * ROW_SIZE + column[None, :], x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tiles_each"])
def _segment_attention_kernel(
    qkv_ptr,  # [num_tokens, 3, HEADS, 2 * HALF]
    cos_ptr,  # [num_tokens, HALF]
    sin_ptr,
    start_ptr,  # [num_segments + 1]
    out_ptr,  # [num_tokens, HEADS, 2 * HALF]
    tiles_each,  # of a segment
    scale,  # of scores, times log2(e)
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HALF_1: tl.constexpr,  # how halves are cut; the second may be 0
    HALF_2: tl.constexpr,
    SIZE_1: tl.constexpr,  # how values are
    SIZE_2: tl.constexpr,
    TURNS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    size: tl.constexpr = 2 * HALF
    stride: tl.constexpr = 3 * HEADS * size
    program, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    segment, tile = program // tiles_each, program % tiles_each
    begin = tl.load(start_ptr + segment)
    count = (tl.load(start_ptr + segment + 1) - begin).to(tl.int32)
    if tile * BLOCK_M >= count:
        return
    q_ptr = qkv_ptr + begin * stride + head * size
    k_ptr, v_ptr = q_ptr + HEADS * size, q_ptr + 2 * HEADS * size
    cos_ptr += begin * HALF
    sin_ptr += begin * HALF
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    q1, q2 = _load_halves(q_ptr, cos_ptr, sin_ptr, m, count, stride, HALF, 0, HALF_1, TURNS)
    if HALF_2:
        q3, q4 = _load_halves(q_ptr, cos_ptr, sin_ptr, m, count, stride, HALF, HALF_1, HALF_2, TURNS)
    out_1 = tl.zeros((BLOCK_M, SIZE_1), tl.float32)
    if SIZE_2:
        out_2 = tl.zeros((BLOCK_M, SIZE_2), tl.float32)
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for at in range(0, count, BLOCK_N):
        n = at + tl.arange(0, BLOCK_N)
        k1, k2 = _load_halves(k_ptr, cos_ptr, sin_ptr, n, count, stride, HALF, 0, HALF_1, TURNS)
        scores = tl.dot(q1, tl.trans(k1), input_precision=PRECISION)
        scores = tl.dot(q2, tl.trans(k2), scores, input_precision=PRECISION)
        if HALF_2:
            k3, k4 = _load_halves(k_ptr, cos_ptr, sin_ptr, n, count, stride, HALF, HALF_1, HALF_2, TURNS)
            scores = tl.dot(q3, tl.trans(k3), scores, input_precision=PRECISION)
            scores = tl.dot(q4, tl.trans(k4), scores, input_precision=PRECISION)
        scores = tl.where((n < count)[None, :], scores * scale, float("-inf"))
        new = tl.maximum(largest, tl.max(scores, 1))  # finite: every step has a key
        shrink = tl.exp2(largest - new)
        p = tl.exp2(scores - new[:, None])
        total = total * shrink + tl.sum(p, 1)
        largest = new
        p = p.to(qkv_ptr.dtype.element_ty)
        v1 = _load_columns(v_ptr, n, count, stride, size, 0, SIZE_1)
        out_1 = tl.dot(p, v1, out_1 * shrink[:, None], input_precision=PRECISION)
        if SIZE_2:
            v2 = _load_columns(v_ptr, n, count, stride, size, SIZE_1, SIZE_2)
            out_2 = tl.dot(p, v2, out_2 * shrink[:, None], input_precision=PRECISION)
    row_size: tl.constexpr = HEADS * size
    out_ptr += begin * row_size + head * size
    _store_columns(out_ptr, out_1 / total[:, None], m, count, row_size, size, 0)
    if SIZE_2:
        _store_columns(out_ptr, out_2 / total[:, None], m, count, row_size, size, SIZE_1)


def segment_attention(
    qkv: torch.Tensor, segments: Segments, cos_sin: tuple[torch.Tensor, torch.Tensor] | None = None
) -> torch.Tensor:
    """See `ops.segment_attention`. head_dim is even."""
    num_tokens, _, num_heads, head_dim = qkv.shape
    out = qkv.new_empty(num_tokens, num_heads, head_dim)
    num_segments = len(segments.start) - 1
    if not num_tokens or not num_segments or not segments.longest:
        return out
    wide = qkv.dtype == torch.float32
    sizes = tiles("segment_attention", "float32" if wide else "")
    tiles_each = triton.cdiv(segments.longest, sizes["BLOCK_M"])
    half_1, half_2 = _cut(head_dim // 2)
    size_1, size_2 = _cut(head_dim)
    cos, sin = (qkv, qkv) if cos_sin is None else (part.contiguous() for part in cos_sin)
    _segment_attention_kernel[(num_segments * tiles_each * num_heads,)](
        qkv.contiguous(),
        cos,
        sin,
        segments.start,
        out,
        tiles_each,
        head_dim**-0.5 * LOG2_E,
        HEADS=num_heads,
        HALF=head_dim // 2,
        HALF_1=half_1,
        HALF_2=half_2,
        SIZE_1=size_1,
        SIZE_2=size_2,
        TURNS=cos_sin is not None,
        PRECISION="ieee" if wide else "tf32",  # says nothing about 16-bit operands
        **sizes,
    )
    return out


def _cut(size: int) -> tuple[int, int]:
    """Powers of two, 16 at least, that hold `size` together; 0 where one does."""
    first = max(triton.next_power_of_2(size + 1) // 2, 16)
    return first, max(triton.next_power_of_2(size - first), 16) if size > first else 0
