"""Attention over the KV cache: the launches of a step, and what they cost."""

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from flexjudge_fast.kernels.catalog import Launch, ModelShape, random_tensor
from flexjudge_fast.kernels.paged_attention import paged_attention
from flexjudge_fast.ops.attention_plan import HostPlan, attention_cuts, plan_attention
from flexjudge_fast.ops.kv_cache import kv_row_size

# New tokens, contexts, and how many tokens of these all sequences have in common.
CASES = {
    "prefill 512 behind 2048": ([512], [2560], 0),
    "decode 2048": ([1] * 16, [2048] * 16, 0),
    "decode 2048, 1792 shared": ([1] * 16, [2048] * 16, 1792),
}


def launches(shape: ModelShape, device: str = "meta") -> Iterator[Launch]:
    """Prefill behind a cached prefix, decode, and decode of sequences with a prefix in common.

    device: of the tensors, which hold a valid step: "cuda" launches really run.
    """
    kv = {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}.get(shape.kv_dtype, str(shape.kv_dtype)[6:])
    for name, (new, context_lens, shared) in CASES.items():
        starts, lens = np.cumsum([0, *new]), np.array(context_lens)
        tables = block_tables(context_lens, shared, shape.block_size)
        plan = plan_step(shape, starts, lens, tables, shared > 0)
        positions = sum(context_lens) - (shared * (len(new) - 1) if shared else 0)
        seen = sum(n * c - n * (n - 1) // 2 for n, c in zip(new, context_lens, strict=True))
        yield Launch(
            kernel="paged_prefill" if len(plan.tiles) else "paged_decode",
            case=f"{name}, {kv}",
            run=functools.partial(_run, *_tensors(shape, starts, lens, tables, plan, device)),
            tokens=int(starts[-1]),
            num_bytes=float(positions * _kv_row(shape) + 2 * _query_bytes(shape, int(starts[-1]))),
            moved_bytes=float(
                sum(decode_bytes(shape, plan).values()) + sum(prefill_bytes(shape, plan).values())
            ),
            flops=4.0 * seen * shape.num_heads * shape.head_dim,
        )


def plan_step(
    shape: ModelShape,
    starts: NDArray[np.int64],
    lens: NDArray[np.int64],
    tables: NDArray[np.int64],
    shared: bool,
) -> HostPlan:
    """The plan of a step on the current architecture. shared: with tiles for prefixes in common."""
    heads, kv_heads = shape.num_heads, shape.num_kv_heads
    cuts = attention_cuts(shape.dtype, shape.kv_dtype, shape.block_size, heads, kv_heads, shape.head_dim)
    return plan_attention(starts, lens, tables, shape.block_size, cuts[shared])


def block_tables(context_lens: list[int], shared: int, block_size: int) -> NDArray[np.int64]:
    """[num_seqs, max_blocks] of sequences whose first `shared` tokens are the same."""
    width = -(-max(context_lens) // block_size)
    tables = np.arange(len(context_lens) * width).reshape(len(context_lens), width)
    tables[:, : shared // block_size] = np.arange(shared // block_size)
    return tables


def decode_bytes(shape: ModelShape, plan: HostPlan) -> dict[str, int]:
    """Bytes that the decode kernel and the merge move, by what they are.

    The cache's are exact. Of a query row, a block table's entry or a list's, an address that several threads
    of one program ask for is counted once. Partial results are written and read; what the L2 still has of
    them then is counted all the same.
    """
    if not len(plan.merges):
        return {}
    items = plan.items[plan.items[:, 1] > 0].astype(np.int64)
    positions = np.minimum(plan.cut.chunk, plan.order[items[:, 0], 2] - plan.cut.chunk * items[:, 2])
    pairs, num_merges = int(items[:, 1].sum()), int((plan.merges[:, 0] >= 0).sum())
    partials = _query_bytes(shape, pairs) + 8 * pairs * shape.num_heads
    return {
        "cache": int(positions.sum()) * _kv_row(shape),
        "query": _query_bytes(shape, pairs),
        "tables": int((-(-positions // shape.block_size)).sum()) * shape.num_kv_heads * 8,
        "lists": shape.num_kv_heads * (12 * len(plan.items) + 16 * pairs),
        "partials written": partials,
        "partials read": partials,
        "merges": 12 * len(plan.merges) * shape.num_heads,
        "out": _query_bytes(shape, num_merges),
    }


def prefill_bytes(shape: ModelShape, plan: HostPlan) -> dict[str, int]:
    """Bytes that the prefill kernel moves, by what they are. Its tiles read the same keys, out of the L2."""
    if not len(plan.tiles):
        return {}
    tokens, sees = plan.tiles[:, 2].astype(np.int64), plan.tiles[:, 3].astype(np.int64)
    positions = sees + tokens - 1
    return {
        "cache": int(positions.sum()) * _kv_row(shape),
        "tables": int((-(-positions // shape.block_size)).sum()) * shape.num_kv_heads * 8,
        "lists": plan.tiles.nbytes * shape.num_kv_heads,
        "query": _query_bytes(shape, int(tokens.sum())),
        "out": _query_bytes(shape, int(tokens.sum())),
    }


def _kv_row(shape: ModelShape) -> int:
    """Bytes of a token's keys and values."""
    return 2 * shape.num_kv_heads * kv_row_size(shape.head_dim, shape.kv_dtype) * shape.kv_dtype.itemsize


def _query_bytes(shape: ModelShape, tokens: int) -> int:
    return tokens * shape.num_heads * shape.head_dim * shape.dtype.itemsize


def _tensors(
    shape: ModelShape,
    starts: NDArray[np.int64],
    lens: NDArray[np.int64],
    tables: NDArray[np.int64],
    plan: HostPlan,
    device: str,
) -> tuple[Any, ...]:
    """Arguments of `paged_attention`."""
    kv_dtype, row_size = shape.kv_dtype, kv_row_size(shape.head_dim, shape.kv_dtype)
    size = (2, tables.size, shape.block_size, shape.num_kv_heads, row_size)
    return (
        random_tensor(int(starts[-1]), shape.num_heads, shape.head_dim, dtype=shape.dtype, device=device),
        random_tensor(*size, dtype=kv_dtype, device=device),
        torch.from_numpy(tables).to(device),
        torch.from_numpy(starts).to(device),
        torch.from_numpy(lens).to(device),
        shape.head_dim**-0.5,
        plan.to(device),
    )


def _run(*arguments: Any) -> None:
    """A launch's `run` returns nothing."""
    paged_attention(*arguments)
