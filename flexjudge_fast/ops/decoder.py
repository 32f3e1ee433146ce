"""A whole decoder step in one call on the CPU: every layer, then the logits that are needed."""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from flexjudge_fast.ops.packed import PackedMatrix
from flexjudge_fast.ops.plan import (
    PackedLayer,
    PackedLinear,
    float_number,
    layer_numbers,
    linear_numbers,
    matrix_numbers,
    open_plan,
)


@dataclass(frozen=True, eq=False)
class PackedDecoder:
    """A decoder's weights and sizes.

    `activation_bytes`: of an activation before a quantised product, 2 or 1.
    """

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    activation_bytes: int
    layers: Sequence[PackedLayer]
    norm: torch.Tensor
    head: PackedLinear
    embed: PackedMatrix
    cos: torch.Tensor  # [max_positions, head_dim / 2] float32
    sin: torch.Tensor
    rope_sections: Sequence[int]  # of head_dim / 2, for M-RoPE; plain RoPE has one


@dataclass(frozen=True)
class DecoderStep:
    """A step's tokens and where they live; int64, contiguous, on the CPU."""

    token_ids: torch.Tensor  # [num_tokens]; from vocab_size on: rows of `media`
    positions: torch.Tensor  # [num_tokens], or [num_sections, num_tokens]
    slots: torch.Tensor  # [num_tokens]
    block_tables: torch.Tensor  # [num_seqs, max_blocks]
    query_start: torch.Tensor  # [num_seqs + 1]
    context_lens: torch.Tensor  # [num_seqs]
    logit_rows: torch.Tensor  # [num_rows], tokens whose logits are needed
    max_context: int  # the largest of context_lens
    media: torch.Tensor | None = None  # [num_media, hidden] float32: embeddings that stand for placeholders


class DecoderPlan:
    """The decoder as the compiled op reads it: addresses and sizes, and the memory its steps work in.

    Keeps the weights alive. One step at a time.
    """

    def __init__(self, model: PackedDecoder) -> None:
        self.model = model
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self._room = (0, 0, 0)  # tokens, context and threads the scratch is enough for
        numbers = [model.hidden_size, model.intermediate_size, model.num_heads, model.num_kv_heads]
        numbers += [model.head_dim, float_number(model.rms_norm_eps), model.activation_bytes]
        numbers += [len(model.layers), *(n for layer in model.layers for n in layer_numbers(layer))]
        numbers += [model.norm.data_ptr(), *linear_numbers(model.head), *matrix_numbers(model.embed)]
        numbers += [model.cos.data_ptr(), model.sin.data_ptr(), len(model.cos)]
        numbers += [len(model.rope_sections), *model.rope_sections]
        self.handle = open_plan(torch.ops.flexjudge.open_decoder, numbers)
        self.no_media = torch.empty(0, model.hidden_size)
        freed = weakref.finalize(self, torch.ops.flexjudge.close_decoder, self.handle)
        freed.atexit = False  # another thread may still be in a step then

    def __reduce__(self) -> str:
        raise TypeError("a decoder plan holds an address and cannot be copied")

    def scratch(self, num_tokens: int, max_context: int, threads: int) -> torch.Tensor:
        """uint8, 64-byte aligned, enough for such a step; kept from step to step, so that it stays mapped."""
        wanted = (num_tokens, max_context, threads)
        if any(want > room for want, room in zip(wanted, self._room, strict=True)):
            tokens, context, most_threads = self._room
            self._room = (
                max(tokens, num_tokens),
                max(context, 2 * max_context),  # grows with every token
                max(most_threads, threads),
            )
            size = torch.ops.flexjudge.decoder_scratch_bytes(self.handle, *self._room)
            memory = torch.empty(size + 64, dtype=torch.uint8)
            self._scratch = memory[-memory.data_ptr() % 64 :]
        return self._scratch


def run_decoder(
    plan: DecoderPlan, step: DecoderStep, cache: torch.Tensor, threads: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Embed the tokens, run every layer, the final norm and the LM head.

    Its reference is the plain torch `Decoder`.

    Args:
        cache: [num_layers, 2, num_blocks, block_size, num_kv_heads, row_size], written in place; `row_size`
            as in `ops/kv_cache.py`. Inside a block the elements have the kernels' own order.

    Returns:
        Logits [num_rows, vocab_size] float32; bool [num_rows], whether a row's are all finite.
    """
    logits, finite = torch.ops.flexjudge.decoder(
        plan.handle,
        step.token_ids,
        step.positions,
        step.slots,
        plan.no_media if step.media is None else step.media,
        step.block_tables,
        step.query_start,
        step.context_lens,
        cache,
        step.logit_rows,
        plan.scratch(len(step.token_ids), step.max_context, threads),
        threads,
    )
    return logits, finite
