"""The paged KV cache: what a row of it holds, writes by slot, and whole-block copies for forks."""

from collections.abc import Sequence

import torch

_SCALE_BYTES = 4  # a float32, kept behind the int8 codes


def kv_row_size(head_dim: int, dtype: torch.dtype) -> int:
    """Elements that one token's keys (or values) of one KV head take in a cache of `dtype`."""
    return head_dim + _SCALE_BYTES if dtype == torch.int8 else head_dim


def quantize_kv(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What an int8 cache makes of rows [..., head_dim]: symmetric, the largest magnitude becomes 127.

    Returns:
        int8 codes [..., head_dim] and float32 scales [..., 1]. A row with NaN or infinity gets the scale NaN.
    """
    x = x.float()
    largest = x.abs().amax(-1, keepdim=True)
    limit = torch.full_like(largest, 127.0)  # `127 / largest` would round twice
    inverse = torch.where(largest >= 1e-30, limit / largest, 0.0)
    codes = (x * inverse).round().nan_to_num().to(torch.int8)
    scales = torch.where(largest >= 1e-30, largest / limit, 0.0)
    return codes, torch.where(x.isfinite().all(-1, keepdim=True), scales, torch.nan)


def to_kv_rows(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Keys or values [..., head_dim] as a cache of `dtype` stores them, [..., row_size]."""
    if dtype != torch.int8:
        return x.to(dtype)
    codes, scales = quantize_kv(x)
    return torch.cat((codes, scales.view(torch.int8)), -1)


def from_kv_rows(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The keys or values that a cache's rows [..., row_size] stand for, [..., head_dim]."""
    if rows.dtype != torch.int8:
        return rows.to(dtype)
    exact = torch.promote_types(dtype, torch.float32)
    codes, scales = rows[..., :-_SCALE_BYTES], rows[..., -_SCALE_BYTES:].contiguous().view(torch.float32)
    return (codes.to(exact) * scales.to(exact)).to(dtype)


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
    source, destination = torch.tensor(copies, dtype=torch.int64, device=cache.device).unbind(1)
    cache[:, :, destination] = cache[:, :, source]
