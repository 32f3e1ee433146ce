"""Matrix products with weights of 4 bits in groups along K; activations and products have 16 (or 32) bits.

The tile is transposed as in `linear.py`. A step of STEP = 128 columns takes 32 words of 16 bits a row:

    word j of a row's step:   bits 4 i to 4 i + 3: column 32 i + j,   i = 0..3

so that the lowest nibbles of a thread's words are neighbours in a quarter of the step, and so on, and each
quarter is a product of its own: nothing moves between threads to unpack. (Words of 16 bits, as the weights
they become: then the tile in shared memory, the loads that fill it and the tensor core's operand fit each
other.) Each quarter lies in one group. Per row and group there is one word of 32 bits: the scale in its low
half, zero point or offset in its high one.

A step reads BLOCK_N * 64 bytes of codes, 4 * BLOCK_N * STEP / group bytes of scales and BLOCK_T * STEP
activations, and does 2 * BLOCK_N * BLOCK_T * STEP operations. Up to BLOCK_T tokens each code is read once.
"""

import torch
import triton
import triton.language as tl

from flexjudge_fast.kernels.runs import locate_tile, plan_runs, store_tile, sum_runs

STEP_COLUMNS = 128  # as `ops.linear_w4a16` lays the nibbles out
QUARTER = tl.constexpr(32)


@triton.jit
def _half_float(word, IS_BF16: tl.constexpr):
    """float32 of the 16-bit float in the low half of an int32."""
    if IS_BF16:
        return (word << 16).to(tl.float32, bitcast=True)
    return word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _expand(
    codes, words, i: tl.constexpr, dtype: tl.constexpr, IS_BF16: tl.constexpr, HAS_OFFSET: tl.constexpr
):
    """Nibbles i of codes [BLOCK_N, QUARTER] with words [BLOCK_N]: weights in `dtype`, rounded from float32.

    Three instructions a weight, and half a conversion: a nibble where it stands, read as a float, is the
    denormal number code * 2^(4 i - 149). All of it is exact until an offset is added, fused or not.
    """
    scale = _half_float(words, IS_BF16)
    second = _half_float(words >> 16, IS_BF16)
    added = second if HAS_OFFSET else -(second * scale)
    small = (codes.to(tl.int32) & (15 << (4 * i))).to(tl.float32, bitcast=True)
    code = small * 8.507059173023462e37  # 2^126, near the largest float: 2^(4 i - 23) is left for the scale
    return (code * (scale * (1 << (23 - 4 * i)))[:, None] + added[:, None]).to(dtype)


@triton.jit
def _w4_run(
    x_ptr,
    codes_ptr,
    words_ptr,
    n,
    t,
    num_tokens,
    run,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    TOTAL_STEPS: tl.constexpr,
    GROUP: tl.constexpr,
    IS_BF16: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One run of the product: [BLOCK_N, BLOCK_T], added in order."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    j = tl.arange(0, QUARTER)
    code_ptrs = codes_ptr + n.to(tl.int64)[:, None] * (TOTAL_STEPS * QUARTER) + j[None, :]
    x_ptrs = x_ptr + t.to(tl.int64)[None, :] * K + j[:, None]
    acc = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    for step in range(run * STEPS, tl.minimum((run + 1) * STEPS, TOTAL_STEPS)):
        codes = tl.load(code_ptrs + step * QUARTER)
        for i in tl.static_range(4):
            k = step * STEP + i * QUARTER
            if i * QUARTER % GROUP == 0:
                words = tl.load(words_ptr + k // GROUP * ROWS + n)
            x_mask = t[None, :] < num_tokens
            if K % STEP:
                x_mask = x_mask & (k + j[:, None] < K)
            x = tl.load(x_ptrs + k, mask=x_mask, other=0)
            w = _expand(codes, words, i, dtype, IS_BF16, HAS_OFFSET)
            acc = tl.dot(w, x, acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["num_tokens"])
def _linear_w4a16_kernel(
    x_ptr,  # [num_tokens, K]
    codes_ptr,  # int16 [ROWS, TOTAL_STEPS * QUARTER]
    words_ptr,  # int32 [groups, ROWS]
    bias_ptr,  # [N]
    out_ptr,  # [num_tokens, N], or float32 [NUM_RUNS, num_tokens, N] where runs are parallel
    num_tokens,
    N: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,  # N and padding
    TOTAL_STEPS: tl.constexpr,
    GROUP: tl.constexpr,
    IS_BF16: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    NUM_RUNS: tl.constexpr,
    STEPS: tl.constexpr,
    PARALLEL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,  # STEP
    GROUP_N: tl.constexpr,
):
    n, t = locate_tile(num_tokens, N, BLOCK_N, BLOCK_T, GROUP_N)
    first = tl.program_id(1) if PARALLEL else 0
    if PARALLEL or NUM_RUNS == 1:
        total = _w4_run(
            x_ptr, codes_ptr, words_ptr, n, t, num_tokens, first, K, ROWS, TOTAL_STEPS, GROUP,
            IS_BF16, HAS_OFFSET, STEPS, BLOCK_N, BLOCK_T, BLOCK_K, PRECISION,
        )  # fmt: skip
    else:
        total = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
        for run in range(NUM_RUNS):
            total += _w4_run(
                x_ptr, codes_ptr, words_ptr, n, t, num_tokens, run, K, ROWS, TOTAL_STEPS, GROUP,
                IS_BF16, HAS_OFFSET, STEPS, BLOCK_N, BLOCK_T, BLOCK_K, PRECISION,
            )  # fmt: skip
    if HAS_BIAS and not PARALLEL:
        total += tl.load(bias_ptr + n, mask=n < N, other=0).to(tl.float32)[:, None]
    store_tile(out_ptr, total, first, n, t, num_tokens, N)


def linear_w4a16(
    x: torch.Tensor,
    codes: torch.Tensor,
    words: torch.Tensor,
    rows: int,
    group_size: int,
    is_bf16: bool,
    has_offset: bool,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """`x @ weight.T + bias`, summed in float32; the weight is rounded to the dtype of `x` first.

    Args:
        x: [num_tokens, in_features], bfloat16, float16 or float32.
        codes: int16 [padded rows, padded columns / 4], laid out as at the top of this file.
        words: int32 [groups, padded rows]: a pair of 16-bit floats each.
        rows: out_features, without padding.
        is_bf16: the floats in `words` are bfloat16, not float16.
        has_offset: their second is added to scale * code; else it is a whole number, the code of zero.
        bias: [out_features], dtype of `x`.

    Returns:
        [num_tokens, out_features], dtype of `x`. A token's bits are the same in any batch.
    """
    num_tokens, columns = x.shape
    out = x.new_empty(num_tokens, rows)
    if not num_tokens:
        return out
    wide = x.dtype == torch.float32
    name = "linear_w4a16_float32" if wide else "linear_w4a16"
    plan = plan_runs(name, rows, columns, codes.nbytes + words.nbytes, num_tokens)
    runs = plan.workspace(x, rows, torch.float32)
    _linear_w4a16_kernel[plan.grid(rows, num_tokens)](
        x.contiguous(),
        codes,
        words,
        x if bias is None else bias,
        out if runs is None else runs,
        num_tokens,
        N=rows,
        K=columns,
        ROWS=codes.shape[0],
        TOTAL_STEPS=4 * codes.shape[1] // STEP_COLUMNS,
        GROUP=group_size,
        IS_BF16=is_bf16,
        HAS_OFFSET=has_offset,
        HAS_BIAS=bias is not None,
        PRECISION="ieee" if wide else "tf32",  # says nothing about 16-bit operands
        **plan.arguments,
    )
    if runs is not None:
        sum_runs(runs, out, bias)
    return out
