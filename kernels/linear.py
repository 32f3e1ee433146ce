"""Matrix products with dense weights.

The tile is computed transposed, so that the weight's rows stand where tensor cores want at least 64 of them
and a handful of tokens suffices on the other side:

        K ->                 BLOCK_T tokens
    [ W tile ]  BLOCK_N  .  [ x tile^T ]  BLOCK_K   =  [ out tile^T ]  BLOCK_N x BLOCK_T

A step of BLOCK_K reads BLOCK_N * BLOCK_K weights and BLOCK_T * BLOCK_K activations, and does
2 * BLOCK_N * BLOCK_T * BLOCK_K operations. Up to BLOCK_T tokens each weight is read once.
"""

import torch
import triton
import triton.language as tl

from flexjudge_fast.kernels.runs import locate_tile, plan_runs, store_tile, sum_runs


@triton.jit
def dense_run(
    x_ptr,
    w_ptr,
    n,
    t,
    num_tokens,
    run,
    N: tl.constexpr,
    K: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One run of the product: [BLOCK_N, BLOCK_T] in ACCUMULATOR, added in order."""
    k = tl.arange(0, BLOCK_K)
    first = run * (STEPS * BLOCK_K)
    last = tl.minimum(first + STEPS * BLOCK_K, K)
    w_ptrs = w_ptr + n.to(tl.int64)[:, None] * K + k[None, :]
    x_ptrs = x_ptr + t.to(tl.int64)[None, :] * K + k[:, None]
    acc = tl.zeros((BLOCK_N, BLOCK_T), ACCUMULATOR)
    for start in range(first, last, BLOCK_K):
        x_mask = t[None, :] < num_tokens
        if K % BLOCK_K:
            x_mask = x_mask & (start + k[:, None] < K)
        if K % BLOCK_K or N % BLOCK_N:
            w = tl.load(w_ptrs + start, mask=(n[:, None] < N) & (start + k[None, :] < K), other=0.0)
        else:
            w = tl.load(w_ptrs + start)
        x = tl.load(x_ptrs + start, mask=x_mask, other=0.0)
        if w_ptr.dtype.element_ty == tl.float8e4nv:  # sm_90 adds with 14 bits, until it is told to hand over
            acc = tl.dot(w, x, acc, max_num_imprecise_acc=BLOCK_K)
        else:
            acc = tl.dot(w, x, acc, input_precision=PRECISION, out_dtype=ACCUMULATOR)
    return acc


@triton.jit(do_not_specialize=["num_tokens"])
def _linear_kernel(
    x_ptr,  # [num_tokens, K]
    w_ptr,  # [N, K]
    bias_ptr,  # [N]
    out_ptr,  # [num_tokens, N], or float32 [NUM_RUNS, num_tokens, N] where runs are parallel
    num_tokens,
    N: tl.constexpr,
    K: tl.constexpr,
    NUM_RUNS: tl.constexpr,
    STEPS: tl.constexpr,
    PARALLEL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_N: tl.constexpr,
):
    n, t = locate_tile(num_tokens, N, BLOCK_N, BLOCK_T, GROUP_N)
    first = tl.program_id(1) if PARALLEL else 0
    if PARALLEL or NUM_RUNS == 1:
        total = dense_run(
            x_ptr, w_ptr, n, t, num_tokens, first,
            N, K, STEPS, BLOCK_N, BLOCK_T, BLOCK_K, tl.float32, PRECISION,
        )  # fmt: skip
    else:
        total = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
        for run in range(NUM_RUNS):
            total += dense_run(
                x_ptr, w_ptr, n, t, num_tokens, run,
                N, K, STEPS, BLOCK_N, BLOCK_T, BLOCK_K, tl.float32, PRECISION,
            )  # fmt: skip
    if HAS_BIAS and not PARALLEL:
        total += tl.load(bias_ptr + n, mask=n < N, other=0).to(tl.float32)[:, None]
    store_tile(out_ptr, total, first, n, t, num_tokens, N)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`x @ weight.T + bias`, summed in float32.

    Args:
        x: [num_tokens, in_features], float32, float16 or bfloat16.
        weight: [out_features, in_features], same dtype, contiguous.
        bias: [out_features], same dtype.

    Returns:
        [num_tokens, out_features], dtype of `x`. A token's bits are the same in any batch.
    """
    num_tokens, (rows, columns) = x.shape[0], weight.shape
    out = x.new_empty(num_tokens, rows)
    if not num_tokens:
        return out
    wide = x.dtype == torch.float32
    name = "linear_float32" if wide else "linear"
    plan = plan_runs(name, rows, columns, weight.nbytes, num_tokens)
    runs = plan.workspace(x, rows, torch.float32)
    _linear_kernel[plan.grid(rows, num_tokens)](
        x.contiguous(),
        weight,
        x if bias is None else bias,
        out if runs is None else runs,
        num_tokens,
        N=rows,
        K=columns,
        HAS_BIAS=bias is not None,
        PRECISION="ieee" if wide else "tf32",  # says nothing about 16-bit operands
        **plan.arguments,
    )
    if runs is not None:
        sum_runs(runs, out, bias)
    return out
