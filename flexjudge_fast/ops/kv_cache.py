"""The paged KV cache: what a row of it holds, writes by slot, and whole-block copies for forks.

Caches of one byte an element (int8, float8_e4m3fn) keep a float32 scale for each token, KV head and side, so
their rows have head_dim + 4 elements. On the CPU a row's scale follows its codes. On a GPU the scales of a
block follow all of its codes ("split blocks"), so that codes can be loaded 128 bits at a time. One side of a
block is then

    codes [block_size, num_kv_heads, head_dim], scales [block_size, num_kv_heads] float32

`to_split_blocks` makes these of rows. Either way, keys' scales multiply scores, values' scales multiply
probabilities.
"""

from collections.abc import Sequence

import torch

from flexjudge_fast.ops.backend import upload

_SCALE_BYTES = 4  # a float32, kept behind the codes
_LIMITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}  # the largest code of caches with a byte an element


def kv_row_size(head_dim: int, dtype: torch.dtype) -> int:
    """Elements that one token's keys (or values) of one KV head take in a cache of `dtype`."""
    return head_dim + _SCALE_BYTES if dtype in _LIMITS else head_dim


def quantize_kv(x: torch.Tensor, dtype: torch.dtype = torch.int8) -> tuple[torch.Tensor, torch.Tensor]:
    """What an 8-bit cache makes of rows [..., head_dim]: symmetric, the largest magnitude becomes 127.

    In float8_e4m3fn it becomes 448.

    Returns:
        Codes [..., head_dim] and float32 scales [..., 1]. A row with NaN or infinity gets the scale NaN.
    """
    x = x.float()
    largest = x.abs().amax(-1, keepdim=True)
    limit = torch.full_like(largest, _LIMITS[dtype])  # `127 / largest` would round twice
    inverse = torch.where(largest >= 1e-30, limit / largest, 0.0)
    codes = (x * inverse).nan_to_num()
    codes = codes.round().to(dtype) if dtype == torch.int8 else codes.clamp(-448, 448).to(dtype)
    scales = torch.where(largest >= 1e-30, largest / limit, 0.0)
    return codes, torch.where(x.isfinite().all(-1, keepdim=True), scales, torch.nan)


def to_kv_rows(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Keys or values [..., head_dim] as a cache of `dtype` stores them, [..., row_size]."""
    if dtype not in _LIMITS:
        return x.to(dtype)
    codes, scales = quantize_kv(x, dtype)
    return torch.cat((codes.view(torch.int8), scales.view(torch.int8)), -1).view(dtype)


def from_kv_rows(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The keys or values that a cache's rows [..., row_size] stand for, [..., head_dim]."""
    if rows.dtype not in _LIMITS:
        return rows.to(dtype)
    exact = torch.promote_types(dtype, torch.float32)
    codes, scales = rows[..., :-_SCALE_BYTES], rows[..., -_SCALE_BYTES:].contiguous().view(torch.float32)
    return (codes.to(exact) * scales.to(exact)).to(dtype)


def to_split_blocks(cache: torch.Tensor) -> torch.Tensor:
    """An 8-bit cache [..., block_size, num_kv_heads, row_size] of rows, in split blocks; the same shape."""
    codes, scales = cache.view(torch.int8).split((cache.shape[-1] - _SCALE_BYTES, _SCALE_BYTES), -1)
    return torch.cat((codes.flatten(-3), scales.flatten(-3)), -1).view(cache.shape).view(cache.dtype)


def write_kv(key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """Store one layer's new keys and values, in place.

    Args:
        key, value: [num_tokens, num_kv_heads, head_dim].
        cache: [2, num_blocks, block_size, num_kv_heads, row_size]; keys at 0, values at 1.
        slot_mapping: [num_tokens] int64, `block_id * block_size + offset` of each token.
    """
    flat = cache.flatten(1, 2)  # [2, num_slots, num_kv_heads, row_size]
    flat[0].index_copy_(0, slot_mapping, to_kv_rows(key, cache.dtype))
    flat[1].index_copy_(0, slot_mapping, to_kv_rows(value, cache.dtype))


def copy_blocks(cache: torch.Tensor, copies: Sequence[tuple[int, int]]) -> None:
    """Copy whole blocks `(source, destination)` in every layer, in place.

    Args:
        cache: [num_layers, 2, num_blocks, block_size, num_kv_heads, row_size].
    """
    if not copies:
        return
    source, destination = upload(torch.tensor(copies, dtype=torch.int64), cache.device).unbind(1)
    cache[:, :, destination] = cache[:, :, source]
