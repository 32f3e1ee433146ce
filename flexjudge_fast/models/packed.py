"""A decoder packed for the CPU kernels: the same `step` as `Decoder`, in one call into C++."""

from collections.abc import Iterable

import torch

from flexjudge_fast.layers.attention import AttentionInput
from flexjudge_fast.models.decoder import Decoder, DecoderLayer
from flexjudge_fast.models.packer import Packer
from flexjudge_fast.ops.decoder import DecoderPlan, DecoderStep, PackedDecoder, run_decoder
from flexjudge_fast.ops.plan import PackedLayer
from flexjudge_fast.weights.tensor import Weight


class PackedModel:
    """Takes the weights of `model`, loaded without merging.

    Args:
        activation_bytes: 2 (16-bit activations before a quantised product) or 1.
        num_threads: threads of a step.
    """

    def __init__(self, model: Decoder, activation_bytes: int, num_threads: int) -> None:
        config = self.config = model.config
        self.dtype = model.dtype
        self.num_threads = num_threads
        packer = Packer(_weights(model))
        head = packer.linear(model.lm_head)
        embed = head.parts[0] if config.tie_word_embeddings else packer.matrix(model.embed.weight)
        layers = []
        while model.layers:  # one at a time, so that only one is there in both forms
            layers.append(_pack_layer(packer, model.layers.pop(0)))
        self.plan = DecoderPlan(
            PackedDecoder(
                config.hidden_size,
                config.intermediate_size,
                config.num_heads,
                config.num_kv_heads,
                config.head_dim,
                config.rms_norm_eps,
                activation_bytes,
                layers,
                model.norm.weight.float(),
                head,
                embed,
                model.rotary.cos,
                model.rotary.sin,
                config.rope.sections or [config.head_dim // 2],
            )
        )

    def step(
        self, token_ids: torch.Tensor, inputs: AttentionInput, cache: torch.Tensor, logit_rows: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Decoder.step`; the cache's blocks have the kernels' inner order."""
        step = DecoderStep(
            token_ids,
            inputs.positions,
            inputs.slot_mapping,
            inputs.block_tables,
            inputs.query_start,
            inputs.context_lens,
            logit_rows,
            inputs.max_context,
            inputs.media,
        )
        return run_decoder(self.plan, step, cache, self.num_threads)


def _weights(model: Decoder) -> Iterable[Weight]:
    """All matrices; a tied embedding is the head's."""
    for layer in model.layers:
        for linear in (layer.attention.qkv, layer.attention.out, layer.mlp.gate_up, layer.mlp.down):
            yield from linear.weights
    yield from model.lm_head.weights
    if not model.config.tie_word_embeddings:
        yield model.embed.weight


def _pack_layer(packer: Packer, layer: DecoderLayer) -> PackedLayer:
    attention = layer.attention
    return packer.layer(layer.input_norm, attention.qkv, attention.out, layer.post_norm, layer.mlp)
