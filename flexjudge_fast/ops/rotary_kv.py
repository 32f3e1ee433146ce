"""Rotary embedding of queries and keys, and the write of keys and values to the paged cache, in one step."""

from dataclasses import dataclass
from functools import cached_property

import torch

from flexjudge_fast.ops.backend import uses_triton
from flexjudge_fast.ops.kv_cache import write_kv
from flexjudge_fast.ops.rotary_embedding import rotary_embedding


@dataclass(frozen=True, eq=False)
class RotaryAngles:
    """How far each token of a step turns.

    cos, sin: tables [max_len, head_dim / 2] float32, whose rows are positions.
    positions: [num_tokens] int64; with sections [3, num_tokens] (M-RoPE, Wang et al. 2024, section 2.1).
    sections: of the head_dim / 2 pairs, those that turn by each row of positions; empty for one row.
    dtype: that of the model.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    positions: torch.Tensor
    sections: tuple[int, ...]
    dtype: torch.dtype

    @cached_property
    def cos_sin(self) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of each token, [num_tokens, head_dim / 2] in `dtype`; looked up once a step."""
        return self._look_up(self.cos).to(self.dtype), self._look_up(self.sin).to(self.dtype)

    def _look_up(self, table: torch.Tensor) -> torch.Tensor:
        if not self.sections:
            return table[self.positions]
        parts = table.split(self.sections, dim=1)
        return torch.cat([part[row] for part, row in zip(parts, self.positions, strict=True)], dim=1)


def rotary_kv(
    qkv: torch.Tensor, angles: RotaryAngles, cache: torch.Tensor, slot_mapping: torch.Tensor
) -> torch.Tensor:
    """Turn queries and keys, and store keys and values of one layer, in place.

    Args:
        qkv: [num_tokens, num_heads + 2 * num_kv_heads, head_dim], the heads of q, k and v in this order.
        cache: [2, num_blocks, block_size, num_kv_heads, row_size]; keys at 0, values at 1. The kernel stores
            8-bit blocks in two parts: codes [block_size, num_kv_heads, head_dim], then float32 scales
            [block_size, num_kv_heads].
        slot_mapping: [num_tokens] int64, `block_id * block_size + offset` of each token. The kernel stores
            nothing for -1.

    Returns:
        Queries [num_tokens, num_heads, head_dim], dtype of `qkv`.
    """
    if uses_triton(qkv):
        from flexjudge_fast.kernels.rotary_kv import rotary_kv as kernel

        return kernel(qkv, angles, cache, slot_mapping)
    return rotary_kv_reference(qkv, angles, cache, slot_mapping)


def rotary_kv_reference(
    qkv: torch.Tensor, angles: RotaryAngles, cache: torch.Tensor, slot_mapping: torch.Tensor
) -> torch.Tensor:
    """The same in plain torch: cos and sin are rounded to the model's dtype, rows stored as by `write_kv`."""
    num_kv_heads = cache.shape[3]
    query, key, value = qkv.tensor_split((-2 * num_kv_heads, -num_kv_heads), dim=1)
    write_kv(rotary_embedding(key, *angles.cos_sin), value, cache, slot_mapping)
    return rotary_embedding(query, *angles.cos_sin)
