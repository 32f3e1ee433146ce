"""How matrix products cut the reduction over K: into runs that are always added first to last.

A run is a stretch of columns that one accumulator sums in order. Which runs there are follows from the
weight's shape and the architecture alone; how many programs share them follows from the number of tokens, and
changes nothing in the bits: few tokens run them side by side into a float32 workspace that a second kernel
adds up, many tokens run them one after the other in one program.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from flexjudge_fast.kernels.chips import capability
from flexjudge_fast.kernels.tiles import cdiv, tiles

LADDER = (16, 32, 64, 128, 256)  # tokens for which the tables have tile sizes; the last also for more
_CUT = ("BLOCK_K", "TARGET_PROGRAMS", "MIN_STEPS", "MAX_RUNS", "WORKSPACE_PERMILLE")


@dataclass(frozen=True)
class Plan:
    """How one product is launched.

    steps: of BLOCK_K columns in a run, the last of which may be shorter. constants: tile sizes.
    """

    num_runs: int
    steps: int
    parallel: bool
    constants: Mapping[str, int]

    @property
    def arguments(self) -> dict[str, int]:
        """Compile-time constants of the product's kernel."""
        return {"NUM_RUNS": self.num_runs, "STEPS": self.steps, "PARALLEL": self.parallel, **self.constants}

    def workspace(self, x: torch.Tensor, rows: int, dtype: torch.dtype) -> torch.Tensor | None:
        """[num_runs, num_tokens, rows] for runs that are parallel, beside `x` [num_tokens, columns]."""
        return x.new_empty(self.num_runs, len(x), rows, dtype=dtype) if self.parallel else None

    def grid(self, rows: int, num_tokens: int) -> tuple[int, int]:
        """Programs: tiles of the output, and the runs that have programs of their own."""
        across = cdiv(rows, self.constants["BLOCK_N"])
        down = cdiv(num_tokens, self.constants["BLOCK_T"])
        return across * down, self.num_runs if self.parallel else 1


def plan_runs(kernel: str, rows: int, columns: int, weight_bytes: float, num_tokens: int) -> Plan:
    """The plan for `num_tokens` tokens. The runs depend on `rows` and `columns` alone.

    The table's TARGET_PROGRAMS says how many programs fill the chip, MIN_STEPS how short a run may be,
    MAX_RUNS how many there are at most, and WORKSPACE_PERMILLE how much of the weight's bytes the workspace
    may move (it is written once and read once) before the runs share a program. Then a tile has two
    accumulators, and the table's case is `t64_runs` in place of `t64`.
    """
    return _plan_runs(kernel, rows, columns, weight_bytes, num_tokens, capability())


@functools.lru_cache(maxsize=4096)  # a step launches the same few products in every layer
def _plan_runs(kernel: str, rows: int, columns: int, weight_bytes: float, num_tokens: int, arch: int) -> Plan:
    """`plan_runs` on the architecture `arch`, which is the current one."""
    cut = tiles(kernel)
    total = cdiv(columns, cut["BLOCK_K"])
    wanted = 1
    while (
        wanted < cut["MAX_RUNS"]
        and cdiv(rows, 64) * wanted < cut["TARGET_PROGRAMS"]
        and total // (2 * wanted) >= cut["MIN_STEPS"]
    ):
        wanted *= 2
    steps = cdiv(total, wanted)
    num_runs = cdiv(total, steps)
    traffic = workspace_bytes(num_runs, num_tokens, rows)
    parallel = num_runs > 1 and 1000 * traffic <= cut["WORKSPACE_PERMILLE"] * weight_bytes
    size = next((size for size in LADDER if num_tokens <= size), LADDER[-1])
    chosen = tiles(kernel, f"t{size}" if parallel or num_runs == 1 else f"t{size}_runs")
    constants = {name: value for name, value in chosen.items() if name not in _CUT or name == "BLOCK_K"}
    return Plan(num_runs, steps, parallel, constants)


def workspace_bytes(num_runs: int, num_tokens: int, rows: int) -> int:
    """What writing and reading the workspace of parallel runs moves."""
    return 2 * 4 * num_runs * num_tokens * rows


@triton.jit
def locate_tile(
    num_tokens, N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, GROUP_N: tl.constexpr
):
    """Rows and tokens of this program's tile: (offsets [BLOCK_N], offsets [BLOCK_T]).

    Programs that run at the same time share GROUP_N tiles of rows and all tokens: their loads hit the L2.
    """
    program = tl.program_id(0)
    down = tl.cdiv(num_tokens, BLOCK_T)
    across = tl.cdiv(N, BLOCK_N)
    group = program // (GROUP_N * down)
    width = tl.minimum(across - group * GROUP_N, GROUP_N)
    inside = program - group * GROUP_N * down
    rows = (group * GROUP_N + inside % width) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = (inside // width) * BLOCK_T + tl.arange(0, BLOCK_T)
    return rows, tokens


@triton.jit
def store_tile(out_ptr, x, run, n, t, num_tokens, N: tl.constexpr):
    """Write x [BLOCK_N, BLOCK_T] to [num_tokens, N], or to number `run` of as many."""
    row = (run * num_tokens + t).to(tl.int64)
    out_ptrs = out_ptr + row[None, :] * N + n[:, None]
    tl.store(out_ptrs, x.to(out_ptr.dtype.element_ty), mask=(n[:, None] < N) & (t[None, :] < num_tokens))


@triton.jit(do_not_specialize=["num_tokens"])
def _sum_runs_kernel(
    runs_ptr,  # [NUM_RUNS, num_tokens, N]
    row_scale_ptr,  # float32 [N]
    token_scale_ptr,  # float32 [num_tokens]
    bias_ptr,  # [N]
    out_ptr,  # [num_tokens, N]
    num_tokens,
    N: tl.constexpr,
    NUM_RUNS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One token's BLOCK outputs: reads 4 * NUM_RUNS bytes for each."""
    token = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = n < N
    at = token * N + n
    total = tl.zeros((BLOCK,), runs_ptr.dtype.element_ty)
    for run in tl.static_range(NUM_RUNS):
        total += tl.load(runs_ptr + run * (num_tokens.to(tl.int64) * N) + at, mask=inside, other=0)
    total = total.to(tl.float32)
    if HAS_SCALES:
        total = total * tl.load(token_scale_ptr + token) * tl.load(row_scale_ptr + n, mask=inside, other=0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + n, mask=inside, other=0).to(tl.float32)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=inside)


def sum_runs(
    runs: torch.Tensor,
    out: torch.Tensor,
    bias: torch.Tensor | None,
    scales: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Add `runs` [num_runs, num_tokens, out_features] first to last into `out`, then scales and bias.

    scales: of rows and of tokens, for products of integers.
    """
    num_runs, num_tokens, rows = runs.shape
    table = tiles("sum_runs")
    row_scales, token_scales = scales or (runs, runs)
    _sum_runs_kernel[(cdiv(rows, table["BLOCK"]), num_tokens)](
        runs,
        row_scales,
        token_scales,
        runs if bias is None else bias,
        out,
        num_tokens,
        N=rows,
        NUM_RUNS=num_runs,
        HAS_SCALES=scales is not None,
        HAS_BIAS=bias is not None,
        enable_fp_fusion=False,  # the products above are rounded before the bias is added, here and there
        **table,
    )
