"""Constants of the attention kernels for a layer: tile sizes, and what launches check."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from flexjudge_fast.kernels.chips import capability
from flexjudge_fast.kernels.tiles import next_power_of_2, tiles
from flexjudge_fast.ops.attention_plan import Cut

KV_NAMES = {
    torch.float32: "float",
    torch.float16: "float",
    torch.bfloat16: "float",
    torch.int8: "int8",
    torch.float8_e4m3fn: "fp8",
}
LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class Sizes:
    """common: constants of both kernels, CHUNK and BLOCK_N among them, as they cut the reduction. The others
    are BLOCK_M, num_warps and so on: of prefill, and of decode by itself or with shared prefixes."""

    common: Mapping[str, object]
    prefill: Mapping[str, int]
    decode: Mapping[str, int]
    shared: Mapping[str, int]
    cut: Cut
    shared_cut: Cut


def attention_sizes(
    dtype: torch.dtype, kv_dtype: torch.dtype, block_size: int, heads: int, kv_heads: int, head_dim: int
) -> Sizes:
    """Constants for queries of `dtype` [num_tokens, heads, head_dim] over a cache of `kv_dtype`.

    Raises:
        ValueError: no kernel is for these.
    """
    if kv_dtype not in KV_NAMES or head_dim % 8 or head_dim > 256 or heads % kv_heads:
        raise ValueError(
            f"no attention kernel: {kv_dtype}, head_dim {head_dim}, {heads} over {kv_heads} heads"
        )
    return _sizes(dtype, kv_dtype, block_size, heads, kv_heads, head_dim, capability())


@functools.cache
def _sizes(
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    block_size: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    arch: int,
) -> Sizes:
    """`attention_sizes` on the architecture `arch`, which is the current one."""
    block_d = max(16, next_power_of_2(head_dim))
    wide = dtype == torch.float32
    case = f"d{block_d}_{'float32' if wide else 8 * kv_dtype.itemsize}"
    parts = [dict(tiles(f"attention_{part}", case)) for part in ("prefill", "decode", "shared")]
    for part in parts:  # a tile holds at least a token's heads
        least = next_power_of_2(heads // kv_heads)
        if part["BLOCK_M"] < least:
            part["num_warps"] = max(part["num_warps"], min(8, least // 16))
            part["BLOCK_M"] = least
    reduction = tiles("attention", case)
    common = {
        "BLOCK_SIZE": block_size,
        "HEADS": heads,
        "KV_HEADS": kv_heads,
        "HEAD_DIM": head_dim,
        "KV": KV_NAMES[kv_dtype],
        **reduction,
        "BLOCK_D": block_d,
        "PRECISION": "ieee" if wide else "tf32",  # says nothing about 16-bit operands
    }
    prefill, decode, shared = parts
    cut, shared_cut = (
        Cut(heads // kv_heads, reduction["CHUNK"], part["BLOCK_M"], prefill["BLOCK_M"])
        for part in (decode, shared)
    )
    return Sizes(common, prefill, decode, shared, cut, shared_cut)
