"""Self-attention over the paged KV cache."""

from dataclasses import dataclass

import torch

from flexjudge_fast.layers.linear import Activations, Linear
from flexjudge_fast.ops.attention_plan import AttentionPlan
from flexjudge_fast.ops.flash_attention import FlashPlan
from flexjudge_fast.ops.paged_attention import paged_attention
from flexjudge_fast.ops.rotary_kv import RotaryAngles, rotary_kv


@dataclass(frozen=True)
class AttentionInput:
    """Where the tokens of one step live. Filled per step by `engine.input_buffers`."""

    positions: torch.Tensor  # [num_tokens] int64; [3, num_tokens] for M-RoPE
    slot_mapping: torch.Tensor  # [num_tokens] int64
    block_tables: torch.Tensor  # [num_seqs, max_blocks] int64
    query_start: torch.Tensor  # [num_seqs + 1] int64, on the CPU: offsets into the tokens
    context_lens: torch.Tensor  # [num_seqs] int64, on the CPU: new tokens included
    max_context: int  # the largest of context_lens
    media: torch.Tensor | None = None  # [num_media, hidden]: embeddings that stand for placeholders
    plan: AttentionPlan | FlashPlan | None = None  # of the attention backend of a GPU


class Attention:
    """Fused q/k/v projection, RoPE, cache write, GQA attention, output projection."""

    def __init__(self, qkv: Linear, out: Linear, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
        self.qkv = qkv
        self.out = out
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim

    def __call__(
        self,
        x: Activations,
        angles: RotaryAngles,
        cache: torch.Tensor,
        inputs: AttentionInput,
    ) -> torch.Tensor:
        """Self-attention of a step's tokens.

        x: [num_tokens, hidden], as `qkv` takes it.
        cache: one layer's [2, num_blocks, block_size, num_kv_heads, row_size].
        """
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim))  # [num_tokens, q + k + v heads, head_dim]
        attended = paged_attention(
            rotary_kv(heads, angles, cache, inputs.slot_mapping),
            cache,
            inputs.block_tables,
            inputs.query_start,
            inputs.context_lens,
            self.head_dim**-0.5,
            inputs.plan,
        )
        return self.out(attended.flatten(1))
