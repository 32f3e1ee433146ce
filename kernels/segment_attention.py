"""Attention of every token of a segment to every other.

A program takes BLOCK_M queries of a segment and a head, and runs over its keys BLOCK_N at a time:

    scores [BLOCK_M, BLOCK_N] = q . k
    out [BLOCK_M, head_dim] += exp2(scores - largest so far) . v

What is not a power of two is cut, not padded: 80 columns into 64 + 16. A step reads 2 * BLOCK_N * head_dim
elements and does 4 * BLOCK_M * BLOCK_N * head_dim operations. Only the last keys of a segment need a mask, so
they have a loop of their own.

Queries and keys that turn do so once. Where all segments are short, each key is read by one program, and
turned there. Else a launch before turns all of them: it reads and writes 2 * head_dim elements a token and
head. Either way the two columns of a pair, half a head apart in the input, end up side by side, which
products do not mind: so threads turn what they load, 128 bits at a time, and pass nothing on.

Segments have the same bits in any company: BLOCK_N is one for all lengths, keys come in order from the
segment's first, a row of scores is added up in one order however many rows there are, and products that are
added to are written as `fma`, with no others fused.
"""

import torch
import triton
import triton.language as tl

from flexjudge_fast.kernels.tiles import cdiv, next_power_of_2, tiles
from flexjudge_fast.ops.segment_attention import Segments

LOG2_E = 1.4426950408889634


@triton.jit
def _load_turned(
    x_ptr,
    cos_ptr,
    sin_ptr,
    row,  # [ROWS] offsets of rows from x_ptr
    angle,  # [ROWS] from cos_ptr and sin_ptr
    inside,  # [ROWS]
    HALF: tl.constexpr,
    FROM: tl.constexpr,
    SIZE: tl.constexpr,
    TURN_FIRST: tl.constexpr,
):
    """Pairs FROM to FROM + SIZE, turned, [ROWS, 2 * SIZE]; zeros where there are none."""
    pair = FROM + tl.arange(0, SIZE)
    mask = inside[:, None]
    if FROM + SIZE > HALF:
        mask = mask & (pair < HALF)[None, :]
    row, angle = row[:, None] + pair[None, :], angle[:, None] + pair[None, :]
    x = tl.load(x_ptr + row, mask=mask, other=0).to(tl.float32)
    y = tl.load(x_ptr + HALF + row, mask=mask, other=0).to(tl.float32)
    cos = tl.load(cos_ptr + angle, mask=mask, other=0)
    sin = tl.load(sin_ptr + angle, mask=mask, other=0)
    turned = tl.join(x * cos - y * sin, y * cos + x * sin)
    turned = tl.reshape(turned, (x.shape[0], 2 * SIZE))
    if TURN_FIRST:
        # The largest of one is itself, but stays here: else the compiler would move the layout of a product's
        # operand up to the loads, where several threads hold the same element and each would turn it.
        turned = tl.max(turned[None, :, :], 0)
    return turned.to(x_ptr.dtype.element_ty)


@triton.jit
def _load(
    ptr,
    cos_ptr,
    sin_ptr,
    row,  # [ROWS], counted from where the pointers point
    count,  # of rows that exist
    STRIDE: tl.constexpr,
    COLUMNS: tl.constexpr,
    FROM: tl.constexpr,
    SIZE: tl.constexpr,
    TURNS: tl.constexpr,
    TURN_FIRST: tl.constexpr,
    MASKED: tl.constexpr,  # whether a row may not exist
):
    """Columns FROM to FROM + SIZE, [ROWS, SIZE]; zeros where there are none."""
    if TURNS:
        half: tl.constexpr = COLUMNS // 2
        inside = row < count if MASKED else row >= 0
        x = _load_turned(
            ptr, cos_ptr, sin_ptr, row * STRIDE, row * half, inside, half, FROM // 2, SIZE // 2, TURN_FIRST
        )
    else:
        column = FROM + tl.arange(0, SIZE)
        ptrs = ptr + row[:, None] * STRIDE + column[None, :]
        if FROM + SIZE > COLUMNS:
            mask = (column < COLUMNS)[None, :]
            x = tl.load(ptrs, mask=mask & (row < count)[:, None] if MASKED else mask, other=0)
        elif MASKED:
            x = tl.load(ptrs, mask=(row < count)[:, None], other=0)
        else:
            x = tl.load(ptrs)
    return x


@triton.jit
def _store(ptr, x, row, count, STRIDE: tl.constexpr, COLUMNS: tl.constexpr, FROM: tl.constexpr):
    column = FROM + tl.arange(0, x.shape[1])
    mask = (row < count)[:, None] & (column < COLUMNS)[None, :]
    tl.store(ptr + row[:, None] * STRIDE + column[None, :], x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _turn_kernel(
    qkv_ptr,  # [num_tokens, 3, HEADS, SIZE]
    cos_ptr,  # [num_tokens, SIZE / 2]
    sin_ptr,
    out_ptr,  # [num_tokens, 2, HEADS, SIZE], pairs side by side
    num_rows,  # num_tokens * 2 * HEADS
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    """ROWS of queries and keys; those of one token read the same angles, out of the L1."""
    half: tl.constexpr = SIZE // 2
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token, head = row // (2 * HEADS), row % (2 * HEADS)
    source, angle = token * (3 * HEADS * SIZE) + head * SIZE, token * half
    x = _load_turned(qkv_ptr, cos_ptr, sin_ptr, source, angle, row < num_rows, half, 0, BLOCK_D // 2, False)
    _store(out_ptr, x, row, num_rows, SIZE, SIZE, 0)


@triton.jit(do_not_specialize=["tiles_each"])
def _segment_attention_kernel(
    qk_ptr,  # [num_tokens, PARTS, HEADS, SIZE]: queries, keys, ...
    qkv_ptr,  # [num_tokens, 3, HEADS, SIZE], for the values
    cos_ptr,  # [num_tokens, SIZE / 2]
    sin_ptr,
    start_ptr,  # [num_segments + 1]
    out_ptr,  # [num_tokens, HEADS, SIZE]
    tiles_each,  # of a segment
    scale,  # of scores, times log2(e)
    HEADS: tl.constexpr,
    PARTS: tl.constexpr,
    SIZE: tl.constexpr,
    SIZE_1: tl.constexpr,  # how columns are cut; the second may be 0
    SIZE_2: tl.constexpr,
    TURNS: tl.constexpr,
    PRECISION: tl.constexpr,
    TURN_FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    stride: tl.constexpr = PARTS * HEADS * SIZE
    v_stride: tl.constexpr = 3 * HEADS * SIZE
    o_stride: tl.constexpr = HEADS * SIZE
    program, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    segment, tile = program // tiles_each, program % tiles_each
    begin = tl.load(start_ptr + segment)
    count = (tl.load(start_ptr + segment + 1) - begin).to(tl.int32)
    if tile * BLOCK_M >= count:
        return
    q_ptr = qk_ptr + begin * stride + head * SIZE
    k_ptr = q_ptr + HEADS * SIZE
    v_ptr = qkv_ptr + begin * v_stride + (2 * HEADS + head) * SIZE
    cos_ptr += begin * (SIZE // 2)
    sin_ptr += begin * (SIZE // 2)
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    q_1 = _load(q_ptr, cos_ptr, sin_ptr, m, count, stride, SIZE, 0, SIZE_1, TURNS, TURN_FIRST, True)
    out_1 = tl.zeros((BLOCK_M, SIZE_1), tl.float32)
    if SIZE_2:
        q_2 = _load(q_ptr, cos_ptr, sin_ptr, m, count, stride, SIZE, SIZE_1, SIZE_2, TURNS, TURN_FIRST, True)
        out_2 = tl.zeros((BLOCK_M, SIZE_2), tl.float32)
    largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    whole = count // BLOCK_N * BLOCK_N
    for MASKED in tl.static_range(2):
        for at in range(whole if MASKED else 0, count if MASKED else whole, BLOCK_N):
            n = at + tl.arange(0, BLOCK_N)
            k = _load(k_ptr, cos_ptr, sin_ptr, n, count, stride, SIZE, 0, SIZE_1, TURNS, TURN_FIRST, MASKED)
            v_1 = _load(v_ptr, cos_ptr, sin_ptr, n, count, v_stride, SIZE, 0, SIZE_1, False, False, MASKED)
            scores = tl.dot(q_1, tl.trans(k), input_precision=PRECISION)
            if SIZE_2:
                k = _load(
                    k_ptr, cos_ptr, sin_ptr, n, count, stride, SIZE, SIZE_1, SIZE_2, TURNS, TURN_FIRST, MASKED
                )
                v_2 = _load(
                    v_ptr, cos_ptr, sin_ptr, n, count, v_stride, SIZE, SIZE_1, SIZE_2, False, False, MASKED
                )
                scores = tl.dot(q_2, tl.trans(k), scores, input_precision=PRECISION)
            if MASKED:
                scores = tl.where((n < count)[None, :], scores, float("-inf"))
            new = tl.maximum(largest, tl.max(scores, 1) * scale)  # finite: every step has a key
            shrink = tl.exp2(largest - new)
            p = tl.exp2(tl.fma(scores, scale, -new[:, None]))
            total = tl.fma(total, shrink, tl.sum(p, 1))
            largest = new
            p = p.to(qkv_ptr.dtype.element_ty)
            out_1 = tl.dot(p, v_1, out_1 * shrink[:, None], input_precision=PRECISION)
            if SIZE_2:
                out_2 = tl.dot(p, v_2, out_2 * shrink[:, None], input_precision=PRECISION)
    share = (1.0 / total)[:, None]
    out_ptr += begin * o_stride + head * SIZE
    _store(out_ptr, out_1 * share, m, count, o_stride, SIZE, 0)
    if SIZE_2:
        _store(out_ptr, out_2 * share, m, count, o_stride, SIZE, SIZE_1)


def segment_attention(
    qkv: torch.Tensor, segments: Segments, cos_sin: tuple[torch.Tensor, torch.Tensor] | None = None
) -> torch.Tensor:
    """See `ops.segment_attention`. head_dim is even."""
    num_tokens, _, num_heads, head_dim = qkv.shape
    out = qkv.new_empty(num_tokens, num_heads, head_dim)
    num_segments = len(segments.start) - 1
    if not num_tokens or not num_segments or not segments.longest:
        return out
    qk = qkv = qkv.contiguous()
    case = _case(qkv.dtype, segments.longest)
    sizes = tiles("segment_attention", case)
    tiles_each = cdiv(segments.longest, sizes["BLOCK_M"])
    cos, sin = (qkv, qkv) if cos_sin is None else (part.contiguous() for part in cos_sin)
    if cos_sin is not None and case != "short":
        qk = _turn(qkv, cos, sin)
    size_1, size_2 = _cut(head_dim)
    _segment_attention_kernel[(num_segments * tiles_each * num_heads,)](
        qk,
        qkv,
        cos,
        sin,
        segments.start,
        out,
        tiles_each,
        head_dim**-0.5 * LOG2_E,
        HEADS=num_heads,
        PARTS=qk.shape[1],
        SIZE=head_dim,
        SIZE_1=size_1,
        SIZE_2=size_2,
        TURNS=cos_sin is not None and case == "short",
        PRECISION="ieee" if qkv.dtype == torch.float32 else "tf32",  # says nothing about 16-bit operands
        enable_fp_fusion=False,
        **sizes,
    )
    return out


def _turn(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Queries and keys [num_tokens, 2, num_heads, head_dim], pairs side by side."""
    num_tokens, _, num_heads, head_dim = qkv.shape
    out = qkv.new_empty(num_tokens, 2, num_heads, head_dim)
    sizes = tiles("segment_turn")
    num_rows = num_tokens * 2 * num_heads
    _turn_kernel[(cdiv(num_rows, sizes["ROWS"]),)](
        qkv,
        cos,
        sin,
        out,
        num_rows,
        HEADS=num_heads,
        SIZE=head_dim,
        BLOCK_D=next_power_of_2(head_dim),
        enable_fp_fusion=False,
        **sizes,
    )
    return out


def _case(dtype: torch.dtype, longest: int) -> str:
    """Of the tiles."""
    if dtype == torch.float32:
        return "float32"
    return "short" if longest <= tiles("segment_attention", "short")["BLOCK_M"] else "long"


def _cut(size: int) -> tuple[int, int]:
    """Powers of two, 16 at least, that hold `size` together; 0 where one does."""
    first = max(next_power_of_2(size + 1) // 2, 16)
    return first, max(next_power_of_2(size - first), 16) if size > first else 0
