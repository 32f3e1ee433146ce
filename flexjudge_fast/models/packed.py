"""A decoder packed for the CPU kernels: the same `step` as `Decoder`, in one call into C++."""

from collections.abc import Iterator

import torch

from flexjudge_fast.layers.attention import AttentionInput
from flexjudge_fast.layers.linear import Linear
from flexjudge_fast.models.decoder import Decoder, DecoderLayer
from flexjudge_fast.ops.decoder import (
    DecoderPlan,
    DecoderStep,
    PackedDecoder,
    PackedLayer,
    PackedLinear,
    run_decoder,
)
from flexjudge_fast.ops.packed import PackedMatrix, WeightMemory, pack, packed_bytes
from flexjudge_fast.weights.tensor import QuantTensor, Weight

_DENSE_FORMATS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


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
        packer = _Packer(model)
        head = packer.linear(model.lm_head)
        embed = head.parts[0] if config.tie_word_embeddings else packer.matrix(model.embed.weight)
        layers = []
        while model.layers:  # one at a time, so that only one is there in both forms
            layers.append(packer.layer(model.layers.pop(0), config.intermediate_size))
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
                [config.head_dim // 2],
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
        )
        return run_decoder(self.plan, step, cache, self.num_threads)


class _Packer:
    """Packs a model's weights into one stretch of memory."""

    def __init__(self, model: Decoder) -> None:
        weights = [weight for linear in _linears(model) for weight in linear.weights]
        if not model.config.tie_word_embeddings:
            weights.append(model.embed.weight)
        self.memory = WeightMemory(sum(packed_bytes(_format(w), *w.shape) for w in weights))

    def layer(self, layer: DecoderLayer, intermediate: int) -> PackedLayer:
        gate_up = layer.mlp.gate_up
        gate, up = gate_up.weights  # apart: this model is loaded without merging
        biases = (None, None) if gate_up.bias is None else gate_up.bias.float().split(intermediate)
        return PackedLayer(
            input_norm=layer.input_norm.weight.float(),
            qkv=self.linear(layer.attention.qkv),
            out=self.linear(layer.attention.out),
            post_norm=layer.post_norm.weight.float(),
            gate=PackedLinear([self.matrix(gate)], biases[0]),
            up=PackedLinear([self.matrix(up)], biases[1]),
            down=self.linear(layer.mlp.down),
        )

    def linear(self, linear: Linear) -> PackedLinear:
        bias = None if linear.bias is None else linear.bias.float()
        return PackedLinear([self.matrix(weight) for weight in linear.weights], bias)

    def matrix(self, weight: Weight) -> PackedMatrix:
        source = weight.blocks if isinstance(weight, QuantTensor) else weight.data
        return pack(source, _format(weight), weight.shape[1], self.memory)


def _linears(model: Decoder) -> Iterator[Linear]:
    for layer in model.layers:
        yield from (layer.attention.qkv, layer.attention.out, layer.mlp.gate_up, layer.mlp.down)
    yield model.lm_head


def _format(weight: Weight) -> str:
    return weight.format.name if isinstance(weight, QuantTensor) else _DENSE_FORMATS[weight.data.dtype]
