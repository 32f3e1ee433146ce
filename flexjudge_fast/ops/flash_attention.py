"""Attention by the package flash-attn (Dao 2023), where it is installed and asked for."""

from dataclasses import dataclass
from importlib.util import find_spec

import torch

from flexjudge_fast.errors import InvalidArgumentError

_PAGE = 256  # flash-attn's pages are multiples of this


@dataclass(frozen=True)
class FlashPlan:
    """Lengths of a step's sequences on the device. tables: int32 [num_seqs, max_blocks]."""

    query_start: torch.Tensor  # [num_seqs + 1] int32
    key_start: torch.Tensor  # [num_seqs + 1] int32, the context lengths summed up
    tables: torch.Tensor
    max_query: int
    max_context: int


@dataclass(frozen=True)
class HostFlashPlan:
    """`FlashPlan` on the host."""

    plan: FlashPlan

    def to(self, device: torch.device | str) -> FlashPlan:
        p = self.plan
        start, keys, tables = (
            x.to(device, non_blocking=True) for x in (p.query_start, p.key_start, p.tables)
        )
        return FlashPlan(start, keys, tables, p.max_query, p.max_context)


def check_flash_attention(dtype: torch.dtype, kv_dtype: torch.dtype, head_dim: int, block_size: int) -> None:
    """Raise InvalidArgumentError if flash-attn is missing, or cannot read such a cache."""
    name = "attention_backend='flash-attn'"
    if find_spec("flash_attn") is None:
        raise InvalidArgumentError(
            f"{name}: the package is missing; `pip install flash-attn`, or use 'triton'"
        )
    if dtype not in (torch.float16, torch.bfloat16) or kv_dtype != dtype:
        raise InvalidArgumentError(f"{name}: it needs float16 or bfloat16, model and KV cache alike")
    if head_dim % 8 or head_dim > 256:
        raise InvalidArgumentError(f"{name}: heads of {head_dim} numbers; it takes multiples of 8 up to 256")
    if block_size % _PAGE:
        raise InvalidArgumentError(
            f"{name}: block_size={block_size}; it takes multiples of {_PAGE} (block_size={_PAGE})"
        )


def plan_flash_attention(
    query_start: torch.Tensor, context_lens: torch.Tensor, block_tables: torch.Tensor
) -> HostFlashPlan:
    """From a step's lengths on the host, as `paged_attention` takes them."""
    keys = torch.nn.functional.pad(context_lens.cumsum(0), (1, 0))
    return HostFlashPlan(
        FlashPlan(
            query_start.int(),
            keys.int(),
            block_tables.int(),
            int(query_start.diff().max()),
            int(context_lens.max()),
        )
    )


def flash_attention(query: torch.Tensor, cache: torch.Tensor, plan: FlashPlan, scale: float) -> torch.Tensor:
    """`paged_attention` through flash-attn.

    Args:
        query: [num_tokens, num_heads, head_dim] float16 or bfloat16.
        cache: [2, num_blocks, block_size, num_kv_heads, head_dim], dtype of `query`.
    """
    from flash_attn import flash_attn_varlen_func

    out: torch.Tensor = flash_attn_varlen_func(
        query,
        cache[0],
        cache[1],
        plan.query_start,
        plan.key_start,
        plan.max_query,
        plan.max_context,
        softmax_scale=scale,
        causal=True,  # the last query sees all keys, as here
        block_table=plan.tables,
    )
    return out
