"""Attention over the KV cache: the launches of a step, and what they cost."""

import functools
from collections.abc import Iterator

import numpy as np
import torch

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
        least, moved = attention_bytes(shape, plan, context_lens, len(np.unique(tables)))
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
