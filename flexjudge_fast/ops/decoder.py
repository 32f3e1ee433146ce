"""A whole decoder step in one call on the CPU: every layer, then the logits that are needed."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from flexjudge_fast.ops.packed import PackedMatrix


@dataclass(frozen=True, eq=False)
class PackedLinear:
    """Matrices over the same input, side by side, and a float32 bias [rows of all] or `None`."""

    parts: Sequence[PackedMatrix]
    bias: torch.Tensor | None


@dataclass(frozen=True, eq=False)
class PackedLayer:
    """One decoder layer; norms are float32 [hidden]."""

    input_norm: torch.Tensor
    qkv: PackedLinear
    out: PackedLinear
    post_norm: torch.Tensor
    gate: PackedLinear
    up: PackedLinear
    down: PackedLinear


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


@dataclass(frozen=True)
class DecoderStep:
    """Where a step's tokens live; the tensors are int64, contiguous, on the CPU."""

    slots: torch.Tensor  # [num_tokens]
    block_tables: torch.Tensor  # [num_seqs, max_blocks]
    query_start: Sequence[int]  # num_seqs + 1
    context_lens: Sequence[int]  # num_seqs


class DecoderPlan:
    """The decoder as the compiled op reads it: addresses and sizes, and the memory its steps work in.

    Keeps the weights alive. One step at a time.
    """

    def __init__(self, model: PackedDecoder) -> None:
        self.model = model
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self._room = (0, 0, 0)  # tokens, context and threads the scratch is enough for
        (eps_bits,) = struct.unpack("q", struct.pack("d", model.rms_norm_eps))
        numbers = [model.hidden_size, model.intermediate_size, model.num_heads, model.num_kv_heads]
        numbers += [model.head_dim, eps_bits, model.activation_bytes, len(model.layers)]
        for layer in model.layers:
            numbers += [layer.input_norm.data_ptr(), *_linear(layer.qkv), *_linear(layer.out)]
            numbers += [layer.post_norm.data_ptr()]
            numbers += [*_linear(layer.gate), *_linear(layer.up), *_linear(layer.down)]
        numbers += [model.norm.data_ptr(), *_linear(model.head)]
        self.numbers = torch.tensor(numbers, dtype=torch.int64)

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
            size = torch.ops.flexjudge.decoder_scratch_bytes(self.numbers, *self._room)
            memory = torch.empty(size + 64, dtype=torch.uint8)
            self._scratch = memory[-memory.data_ptr() % 64 :]
        return self._scratch


def run_decoder(
    plan: DecoderPlan,
    hidden: torch.Tensor,
    cos_sin: tuple[torch.Tensor, torch.Tensor],
    step: DecoderStep,
    cache: torch.Tensor,
    logit_rows: torch.Tensor,
    threads: int,
) -> torch.Tensor:
    """Run every layer, the final norm and the LM head. Its reference is the plain torch `Decoder`.

    Args:
        hidden: [num_tokens, hidden] float32, the embedded tokens; overwritten.
        cos_sin: [num_tokens, head_dim / 2] float32 each.
        cache: [num_layers, 2, num_blocks, block_size, num_kv_heads, row_size], written in place; `row_size`
            as in `ops/kv_cache.py`. Inside a block the elements have the kernels' own order.
        logit_rows: [num_rows] int64, tokens whose logits are needed.

    Returns:
        [num_rows, vocab_size] float32.
    """
    out: torch.Tensor = torch.ops.flexjudge.decoder(
        plan.numbers,
        hidden,
        *cos_sin,
        step.slots,
        step.block_tables,
        torch.tensor(step.query_start),
        torch.tensor(step.context_lens),
        cache,
        logit_rows,
        plan.scratch(len(hidden), max(step.context_lens), threads),
        threads,
    )
    return out


def _linear(linear: PackedLinear) -> list[int]:
    numbers = [len(linear.parts), 0 if linear.bias is None else linear.bias.data_ptr()]
    for part in linear.parts:
        numbers += [part.data.data_ptr(), torch.ops.flexjudge.format_id(part.format_name)]
        numbers += [part.rows, part.columns]
    return numbers
