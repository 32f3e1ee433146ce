"""Matrix products of 8-bit weights with 8-bit activations, both int8 or both float8 (e4m3).

The tile is transposed as in `linear.py`. A step reads BLOCK_N * BLOCK_K bytes of weights and BLOCK_T *
BLOCK_K of activations, and does 2 * BLOCK_N * BLOCK_T * BLOCK_K operations. Sums of int8 are exact in int32;
those of float8 are float32, and tensor cores that add with fewer bits hand over after each step.
"""

import torch
import triton
import triton.language as tl

from flexjudge_fast.kernels.linear import dense_run
from flexjudge_fast.kernels.quantize_tokens import check_float8
from flexjudge_fast.kernels.runs import locate_tile, plan_runs, store_tile, sum_runs


@triton.jit(do_not_specialize=["num_tokens"])
def _linear_w8a8_kernel(
    x_ptr,  # [num_tokens, K]
    x_scale_ptr,  # float32 [num_tokens]
    w_ptr,  # [N, K]
    w_scale_ptr,  # float32 [N]
    bias_ptr,  # [N]
    out_ptr,  # [num_tokens, N], or int32 or float32 [NUM_RUNS, num_tokens, N] where runs are parallel
    num_tokens,
    N: tl.constexpr,
    K: tl.constexpr,
    NUM_RUNS: tl.constexpr,
    STEPS: tl.constexpr,
    PARALLEL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_N: tl.constexpr,
):
    n, t = locate_tile(num_tokens, N, BLOCK_N, BLOCK_T, GROUP_N)
    first = tl.program_id(1) if PARALLEL else 0
    ACCUMULATOR: tl.constexpr = tl.int32 if x_ptr.dtype.element_ty == tl.int8 else tl.float32
    if PARALLEL or NUM_RUNS == 1:
        total = dense_run(
            x_ptr, w_ptr, n, t, num_tokens, first,
            N, K, STEPS, BLOCK_N, BLOCK_T, BLOCK_K, ACCUMULATOR, "tf32",
        )  # fmt: skip
    else:
        total = tl.zeros((BLOCK_N, BLOCK_T), ACCUMULATOR)
        for run in range(NUM_RUNS):
            total += dense_run(
                x_ptr, w_ptr, n, t, num_tokens, run,
                N, K, STEPS, BLOCK_N, BLOCK_T, BLOCK_K, ACCUMULATOR, "tf32",
            )  # fmt: skip
    if not PARALLEL:
        x_scale = tl.load(x_scale_ptr + t, mask=t < num_tokens, other=0)
        w_scale = tl.load(w_scale_ptr + n, mask=n < N, other=0)
        total = total.to(tl.float32) * x_scale[None, :] * w_scale[:, None]
        if HAS_BIAS:
            total += tl.load(bias_ptr + n, mask=n < N, other=0).to(tl.float32)[:, None]
    store_tile(out_ptr, total, first, n, t, num_tokens, N)


def linear_w8a8(
    codes: torch.Tensor,
    scales: torch.Tensor,
    weight: torch.Tensor,
    weight_scales: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """`(codes * scales) @ (weight * weight_scales).T + bias`.

    Args:
        codes: [num_tokens, in_features], int8 or float8_e4m3fn. scales: float32 [num_tokens].
        weight: [out_features, in_features], dtype of `codes`. weight_scales: float32 [out_features].
        bias: [out_features], any float dtype.
        dtype: of the result.

    Returns:
        [num_tokens, out_features]. A token's bits are the same in any batch.

    Raises:
        ValueError: float8 on a chip whose tensor cores have none.
    """
    num_tokens, (rows, columns) = codes.shape[0], weight.shape
    is_int = codes.dtype == torch.int8
    check_float8(codes.dtype)
    out = codes.new_empty(num_tokens, rows, dtype=dtype)
    if not num_tokens:
        return out
    plan = plan_runs("linear_int8" if is_int else "linear_fp8", rows, columns, weight.nbytes, num_tokens)
    runs = plan.workspace(codes, rows, torch.int32 if is_int else torch.float32)
    _linear_w8a8_kernel[plan.grid(rows, num_tokens)](
        codes.contiguous(),
        scales,
        weight,
        weight_scales,
        scales if bias is None else bias,
        out if runs is None else runs,
        num_tokens,
        N=rows,
        K=columns,
        HAS_BIAS=bias is not None,
        enable_fp_fusion=False,  # as `sum_runs`
        **plan.arguments,
    )
    if runs is not None:
        sum_runs(runs, out, bias, (weight_scales, scales))
    return out
