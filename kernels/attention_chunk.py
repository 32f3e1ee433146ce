"""What prefill and decode have in common: the reduction of one chunk of keys and values, and the merge.

A chunk is CHUNK positions of a sequence, counted from its first. Its keys and values come in tiles of BLOCK_N
positions, one after the other; each moves the running maximum `m`, sum `l` and accumulator `acc`:

    rows = (token, head) pairs of one KV head      q [BLOCK_M, BLOCK_D] stays
    for each tile:  k, v [BLOCK_N, BLOCK_D]        4 * BLOCK_M * BLOCK_N * BLOCK_D operations

A chunk's result is rounded to the query's dtype, as decode keeps it in memory, and chunks are merged first to
last with `merge`. Both kernels do the same operations in the same order for a row, so its bits depend on its
sequence alone. For that, products that are added to are written as `fma`: what the
compiler contracts depends on what stands around it. Exponents are of two (log2(e) is in the scale).
"""

import triton
import triton.language as tl

UNITS = {"int8": 128.0, "fp8": 256.0}  # codes are widened to code / unit, and the scales take the factor


@triton.jit
def _widen(codes, dtype: tl.constexpr, KV: tl.constexpr):
    """Codes of an 8-bit cache, as uint8, to `dtype` in units of UNITS: exact."""
    if KV == "int8":
        # 2^16 + (code + 128) / 128 by its bits, as converting integers runs at a fraction of the rate
        large = ((codes ^ 0x80).to(tl.int32) | 0x47800000).to(tl.float32, bitcast=True)
        return (large - 65537.0).to(dtype)
    # e4m3's bits in float16's places, whose exponent is biased by 8 more
    low = codes.to(tl.int16) & 0x7F
    bits = ((codes.to(tl.int16) & 0x80) << 8) | (low << 7)
    bits = tl.where(low == 0x7F, 0x7E00, bits).to(tl.int16)
    return bits.to(tl.float16, bitcast=True).to(dtype)


@triton.jit
def _load_rows(
    base,
    rows,
    inside,
    dtype: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KV: tl.constexpr,
    WIDEN_FIRST: tl.constexpr,
):
    """[BLOCK_N, BLOCK_D] in `dtype` from elements `rows` on; where not `inside`, zeros."""
    d = tl.arange(0, BLOCK_D)
    mask = inside[:, None]
    if HEAD_DIM < BLOCK_D:
        mask = mask & (d < HEAD_DIM)[None, :]
    x = tl.load(base + rows[:, None] + d[None, :], mask=mask, other=0)
    if KV == "int8" or KV == "fp8":
        x = _widen(x, dtype, KV)
        if WIDEN_FIRST:
            # The sum over one element does nothing but stay here: else the compiler would move the operand's
            # layout up to the bytes, which then cross shared memory one by one, and load 64 bits at a time.
            x = tl.sum(x[None, :, :], 0)
        return x
    return x.to(dtype)


@triton.jit
def attend_chunk(
    q,  # [BLOCK_M, BLOCK_D]
    keys_ptr,  # [num_blocks, BLOCK_SIZE, KV_HEADS, HEAD_DIM], or split blocks of an 8-bit cache
    values_ptr,
    table_ptr,  # the sequence's blocks
    visible,  # [BLOCK_M] keys that each row sees
    start,  # the chunk's first position
    stop,  # the largest of `visible`, beyond which nothing may be read
    kv_head,
    scale,  # with log2(e), and the unit of 8-bit codes
    BLOCK_SIZE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    KV: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    SUM_BY_DOT: tl.constexpr,
    WIDEN_FIRST: tl.constexpr,
):
    """Maximum and sum [BLOCK_M] float32, and one chunk's result [BLOCK_M, BLOCK_D] in the query's dtype."""
    EIGHT_BITS: tl.constexpr = KV == "int8" or KV == "fp8"
    ROW: tl.constexpr = HEAD_DIM + 4 if EIGHT_BITS else HEAD_DIM
    UNIT: tl.constexpr = 128.0 if KV == "int8" else 256.0
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)  # noqa: E741
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if SUM_BY_DOT:
        ones = tl.full((BLOCK_N, 16), 1.0, q.dtype)
        sums = tl.zeros((BLOCK_M, 16), tl.float32)
    for first in range(start, tl.minimum(start + CHUNK, stop), BLOCK_N):
        position = first + tl.arange(0, BLOCK_N)
        inside = position < stop
        block = tl.load(table_ptr + position // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
        slot = (position % BLOCK_SIZE) * KV_HEADS + kv_head
        rows = block * (BLOCK_SIZE * KV_HEADS * ROW) + slot * HEAD_DIM
        k = _load_rows(keys_ptr, rows, inside, q.dtype, HEAD_DIM, BLOCK_D, KV, WIDEN_FIRST)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if EIGHT_BITS:
            at = block * (BLOCK_SIZE * KV_HEADS * ROW // 4) + (BLOCK_SIZE * KV_HEADS * HEAD_DIM // 4) + slot
            scores *= tl.load(keys_ptr.to(tl.pointer_type(tl.float32)) + at, mask=inside, other=0)[None, :]
        scores = tl.where(position[None, :] < visible[:, None], scores, float("-inf"))
        m_new = tl.maximum(m, tl.max(scores, 1) * scale)
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(tl.fma(scores, scale, -shift[:, None]))
        alpha = tl.exp2(m - shift)
        if SUM_BY_DOT:
            sums = tl.dot(p.to(q.dtype), ones, sums * alpha[:, None], input_precision=PRECISION)
        else:
            l = tl.fma(l, alpha, tl.sum(p, 1))  # noqa: E741
        m = m_new
        v = _load_rows(values_ptr, rows, inside, q.dtype, HEAD_DIM, BLOCK_D, KV, WIDEN_FIRST)
        if EIGHT_BITS:
            scales = tl.load(values_ptr.to(tl.pointer_type(tl.float32)) + at, mask=inside, other=0)
            p *= (scales * UNIT)[None, :]
        acc = tl.dot(p.to(q.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    if SUM_BY_DOT:
        l = tl.max(sums, 1)  # noqa: E741
    return m, l, normalise(l, acc).to(q.dtype)


@triton.jit
def merge(m, l, acc, m_next, l_next, result):  # noqa: E741
    """The total so far, not normalised, with the next chunk's: [rows], [rows] and [rows, BLOCK_D]."""
    largest = tl.maximum(m, m_next)
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    old, new = tl.exp2(m - shift), tl.exp2(m_next - shift) * l_next
    return largest, tl.fma(l, old, new), tl.fma(acc, old[:, None], result.to(tl.float32) * new[:, None])


@triton.jit
def normalise(l, acc):  # noqa: E741
    """What the accumulator stands for; zeros where nothing was seen."""
    return acc / tl.where(l == 0.0, 1.0, l)[:, None]


@triton.jit
def load_query(
    q_ptr, tokens, heads, valid, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):
    """[BLOCK_M, BLOCK_D] of (token, head) rows, zeros where not `valid`."""
    d = tl.arange(0, BLOCK_D)
    rows = (tokens.to(tl.int64) * HEADS + heads) * HEAD_DIM
    return tl.load(q_ptr + rows[:, None] + d[None, :], mask=valid[:, None] & (d < HEAD_DIM)[None, :], other=0)


@triton.jit
def store_rows(
    out_ptr, x, tokens, heads, valid, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):
    """The inverse of `load_query`."""
    d = tl.arange(0, BLOCK_D)
    rows = (tokens.to(tl.int64) * HEADS + heads) * HEAD_DIM
    out = out_ptr + rows[:, None] + d[None, :]
    tl.store(out, x.to(out_ptr.dtype.element_ty), mask=valid[:, None] & (d < HEAD_DIM)[None, :])
