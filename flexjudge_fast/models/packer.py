"""Packs weights for the CPU kernels into one stretch of memory."""

from collections.abc import Iterable

import torch

from flexjudge_fast.layers.linear import Linear
from flexjudge_fast.layers.mlp import GatedMLP
from flexjudge_fast.layers.norm import RMSNorm
from flexjudge_fast.ops.packed import PackedMatrix, WeightMemory, pack, packed_bytes
from flexjudge_fast.ops.plan import PackedLayer, PackedLinear
from flexjudge_fast.weights.tensor import QuantTensor, Weight

_DENSE_FORMATS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class Packer:
    """Has room for the matrices `weights`, which are loaded without merging."""

    def __init__(self, weights: Iterable[Weight]) -> None:
        self.memory = WeightMemory(sum(packed_bytes(_format(w), *w.shape) for w in weights))

    def layer(
        self, input_norm: RMSNorm, qkv: Linear, out: Linear, post_norm: RMSNorm, mlp: GatedMLP
    ) -> PackedLayer:
        gate, up = mlp.gate_up.weights  # apart, as nothing was merged
        bias = mlp.gate_up.bias
        biases = (None, None) if bias is None else bias.float().split(gate.shape[0])
        return PackedLayer(
            input_norm=input_norm.weight.float(),
            qkv=self.linear(qkv),
            out=self.linear(out),
            post_norm=post_norm.weight.float(),
            gate=PackedLinear([self.matrix(gate)], biases[0]),
            up=PackedLinear([self.matrix(up)], biases[1]),
            down=self.linear(mlp.down),
        )

    def linear(self, linear: Linear) -> PackedLinear:
        bias = None if linear.bias is None else linear.bias.float()
        return PackedLinear([self.matrix(weight) for weight in linear.weights], bias)

    def matrix(self, weight: Weight) -> PackedMatrix:
        source = weight.blocks if isinstance(weight, QuantTensor) else weight.data
        return pack(source, _format(weight), weight.shape[1], self.memory)


def _format(weight: Weight) -> str:
    return weight.format.name if isinstance(weight, QuantTensor) else _DENSE_FORMATS[weight.data.dtype]
