"""Attention over the KV cache: the launches of a step, and what they cost."""

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from flexjudge_fast.kernels.attention_sizes import Sizes, attention_sizes
from flexjudge_fast.kernels.catalog import Launch, ModelShape
from flexjudge_fast.kernels.paged_attention import paged_attention
from flexjudge_fast.ops.attention_plan import CHUNK, HostPlan, plan_attention
from flexjudge_fast.ops.kv_cache import kv_row_size

CASES = {
    "prefill 512 behind 2048": ([512], [2560], 0),
    "decode 2048": ([1] * 16, [2048] * 16, 0),
    "decode 2048, 1792 shared": ([1] * 16, [2048] * 16, 1792),
}


def launches(shape: ModelShape, device: str = "meta") -> Iterator[Launch]:
    """Prefill behind a cached prefix, decode, and decode of sequences with a prefix in common.

    device: of the tensors, which are fit to run on a "cuda" device.
    """
    sizes = sizes_of(shape)
    group = shape.num_heads // shape.num_kv_heads
    kv = {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}.get(shape.kv_dtype, str(shape.kv_dtype)[6:])
    for name, (new, context_lens, shared) in CASES.items():
        is_shared = shared > 0
        starts = np.cumsum([0, *new])
        tables, num_blocks = block_tables(context_lens, shared, shape.block_size)
        rows = (sizes.shared if is_shared else sizes.decode)["BLOCK_M"]
        plan = plan_attention(
            starts,
            np.array(context_lens),
            tables,
            shape.block_size,
            group,
            rows,
            prefill_rows=sizes.prefill["BLOCK_M"],
        )
        size = (2, num_blocks, shape.block_size, shape.num_kv_heads, kv_row_size(shape.head_dim, shape.kv_dtype))
        cache = torch.zeros(size, dtype=torch.uint8 if shape.kv_dtype.itemsize == 1 else shape.kv_dtype, device=device)
        query = torch.zeros(int(starts[-1]), shape.num_heads, shape.head_dim, dtype=shape.dtype, device=device)
        run = functools.partial(
            _run,
            query,
            cache.view(shape.kv_dtype),
            torch.from_numpy(tables).to(device),
            torch.from_numpy(starts).to(device),
            torch.tensor(context_lens, device=device),
            shape.head_dim**-0.5,
            plan.to(device),
        )
        positions = sum(context_lens) - shared * (len(context_lens) - 1) * is_shared
        least, moved = attention_bytes(shape, plan, int(starts[-1]), positions)
        seen = sum(n * c - n * (n - 1) // 2 for n, c in zip(new, context_lens, strict=True))
        yield Launch(
            kernel="attention_prefill" if len(plan.tiles) else "attention_decode",
            case=f"{name}, {kv}",
            run=run,
            tokens=int(starts[-1]),
            num_bytes=least,
            moved_bytes=moved,
            flops=4.0 * seen * shape.num_heads * shape.head_dim,
        )


def sizes_of(shape: ModelShape) -> Sizes:
    """The kernels' constants for this model."""
    return attention_sizes(
        shape.dtype, shape.kv_dtype, shape.block_size, shape.num_heads, shape.num_kv_heads, shape.head_dim
    )


def block_tables(context_lens: list[int], shared: int, block_size: int) -> tuple[NDArray[np.int64], int]:
    """[num_seqs, max_blocks] of sequences whose first `shared` tokens are the same, and the number of blocks."""
    width = -(-max(context_lens) // block_size)
    common = shared // block_size
    tables = np.arange(len(context_lens) * width).reshape(len(context_lens), width)
    tables[:, :common] = np.arange(common)
    return tables, tables.size


def decode_loads(shape: ModelShape, plan: HostPlan) -> dict[str, int]:
    """Bytes that the decode kernel loads of the cache, the query, the block tables and the plan's lists.

    An address that several threads of one load ask for is counted once, except in the lists, which are tiny.
    """
    items = plan.items[plan.items[:, 1] > 0]
    contexts = plan.order[items[:, 0], 2].astype(np.int64)
    positions = int(np.minimum(CHUNK, contexts - CHUNK * items[:, 2]).sum())
    pairs = int(items[:, 1].sum())
    row = kv_row_size(shape.head_dim, shape.kv_dtype) * shape.kv_dtype.itemsize
    kv_heads = shape.num_kv_heads
    return {
        "cache": 2 * positions * kv_heads * row,
        "query": pairs * shape.num_heads * shape.head_dim * shape.dtype.itemsize,
        "tables": -(-positions // shape.block_size) * kv_heads * 8,
        "lists": kv_heads * (plan.items.nbytes + pairs * 16),
    }


def attention_bytes(shape: ModelShape, plan: HostPlan, num_rows: int, num_positions: int) -> tuple[float, float]:
    """The least a step's attention must move, and what the kernels' own loads and stores move.

    The least: keys and values of each position once, the query and the result. Partial results are written once and
    read once; what is in the L2 by then is counted all the same.

    Args:
        num_rows: new tokens. num_positions: in all blocks that are read.
    """
    row = kv_row_size(shape.head_dim, shape.kv_dtype) * shape.kv_dtype.itemsize
    kv_row = 2 * shape.num_kv_heads * row
    tokens = num_rows * shape.num_heads * shape.head_dim * shape.dtype.itemsize
    least = float(num_positions * kv_row + 2 * tokens)
    moved = 0.0
    if len(plan.items):
        pairs = int(plan.items[:, 1].sum())
        partials = 2 * pairs * shape.num_heads * (4 * shape.head_dim + 8)
        merged = int((plan.merges[:, 0] >= 0).sum()) * shape.num_heads * shape.head_dim * shape.dtype.itemsize
        moved += sum(decode_loads(shape, plan).values()) + partials + merged + plan.merges.nbytes * shape.num_heads
    if len(plan.tiles):
        reads = int((plan.tiles[:, 2].astype(np.int64) + plan.tiles[:, 3] - 1).sum())
        new = int(plan.tiles[:, 2].sum())
        table_bytes = reads / shape.block_size * 8 * shape.num_kv_heads
        moved += reads * kv_row + table_bytes + plan.tiles.nbytes * shape.num_kv_heads
        moved += 2 * new * shape.num_heads * shape.head_dim * shape.dtype.itemsize
    return least, moved


def _run(*arguments: Any) -> None:
    """A launch's `run` returns nothing."""
    paged_attention(*arguments)
