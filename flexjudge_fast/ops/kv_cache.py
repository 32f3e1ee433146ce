"""Writes to the paged KV cache: new keys and values by slot, and whole-block copies for forks."""

from collections.abc import Sequence

import torch


def write_kv(key: torch.Tensor, value: torch.Tensor, cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """Store one layer's new keys and values, in place.

    Args:
        key, value: [num_tokens, num_kv_heads, head_dim].
        cache: [2, num_blocks, block_size, num_kv_heads, head_dim]; keys at 0, values at 1.
        slot_mapping: [num_tokens] int64, `block_id * block_size + offset` of each token.
    """
    flat = cache.flatten(1, 2)  # [2, num_slots, num_kv_heads, head_dim]
    flat[0].index_copy_(0, slot_mapping, key.to(cache.dtype))
    flat[1].index_copy_(0, slot_mapping, value.to(cache.dtype))


def copy_blocks(cache: torch.Tensor, copies: Sequence[tuple[int, int]]) -> None:
    """Copy whole blocks `(source, destination)` in every layer, in place.

    Args:
        cache: [num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim].
    """
    if not copies:
        return
    source, destination = torch.tensor(copies, dtype=torch.int64, device=cache.device).unbind(1)
    cache[:, :, destination] = cache[:, :, source]
