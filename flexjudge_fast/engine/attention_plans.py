"""How a step's attention is cut up, by the backend that computes it."""

from dataclasses import dataclass
from typing import Protocol

import torch

from flexjudge_fast.engine.graph_ladder import Rung
from flexjudge_fast.errors import InvalidArgumentError
from flexjudge_fast.layers.attention import AttentionInput
from flexjudge_fast.models.config import DecoderConfig
from flexjudge_fast.ops.attention_plan import Cut, HostPlan, attention_cuts, plan_attention
from flexjudge_fast.ops.flash_attention import HostFlashPlan, check_flash_attention, plan_flash_attention


class AttentionPlanner(Protocol):
    """Makes what the attention op needs to know of a step beside its input. records: in CUDA graphs, too."""

    @property
    def records(self) -> bool: ...

    def plan(self, inputs: AttentionInput, rung: Rung | None) -> HostPlan | HostFlashPlan | None:
        """Of a step whose `inputs` are on the host; with a rung, of the recorded step's size."""
        ...


@dataclass(frozen=True)
class TritonPlanner:
    """Work lists of our own kernels. cut, shared_cut: without and with blocks in common."""

    cut: Cut
    shared_cut: Cut
    block_size: int
    records: bool = True

    def plan(self, inputs: AttentionInput, rung: Rung | None) -> HostPlan:
        tables = inputs.block_tables.numpy()
        lens = inputs.context_lens.numpy()
        chunk = self.cut.chunk
        most = None if rung is None else rung.num_seqs * -(-rung.table_width * self.block_size // chunk)
        # A larger tile pays where sequences have blocks in common.
        shares = len(tables) > 1 and lens.max(initial=0) >= chunk and (tables[1:, 0] == tables[:-1, 0]).any()
        return plan_attention(
            inputs.query_start.numpy(),
            lens,
            tables,
            self.block_size,
            self.shared_cut if shares else self.cut,
            most,
        )


@dataclass(frozen=True)
class FlashPlanner:
    """Lengths and tables as flash-attn takes them."""

    records: bool = False

    def plan(self, inputs: AttentionInput, rung: Rung | None) -> HostFlashPlan:
        return plan_flash_attention(inputs.query_start, inputs.context_lens, inputs.block_tables)


@dataclass(frozen=True)
class NoPlanner:
    """Plain torch asks for lengths on the host: slow, and nothing that a graph can hold."""

    records: bool = False

    def plan(self, inputs: AttentionInput, rung: Rung | None) -> None:
        return None


def make_planner(
    backend: str, config: DecoderConfig, dtype: torch.dtype, kv_dtype: torch.dtype, block_size: int
) -> AttentionPlanner:
    """The planner for `attention_backend=`.

    Raises:
        InvalidArgumentError: the backend is not installed, or cannot do this.
    """
    if backend in ("auto", "triton"):
        heads, kv_heads = config.num_heads, config.num_kv_heads
        cuts = attention_cuts(dtype, kv_dtype, block_size, heads, kv_heads, config.head_dim)
        return TritonPlanner(*cuts, block_size)
    if kv_dtype.itemsize == 1:
        raise InvalidArgumentError(
            f"attention_backend={backend!r}: it reads no 8-bit KV cache; 'triton' does"
        )
    if backend == "torch":
        return NoPlanner()
    check_flash_attention(dtype, kv_dtype, config.head_dim, block_size)
    return FlashPlanner()
