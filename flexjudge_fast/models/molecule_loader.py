"""Loads the layers of the molecule encoders, whose sizes are those of their tensors."""

import re
from collections.abc import Sequence

import torch

from flexjudge_fast.layers.linear import Activations, Linear
from flexjudge_fast.layers.norm import LayerNorm
from flexjudge_fast.models.loader import TensorLoader
from flexjudge_fast.ops.packed import pack, packed_linear
from flexjudge_fast.weights.checkpoint import Checkpoint
from flexjudge_fast.weights.tensor import DenseTensor

_PLAIN_TERMS = 2  # bytes of a quantised activation; these weights are plain, so there is none


class PackedProduct(Linear):
    """A `Linear` of the CPU kernels: a row's bits do not depend on the rows beside it."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, num_threads: int) -> None:
        super().__init__([], bias, merge=False)
        self.packed = pack(weight, "F32", weight.shape[1])
        self.out_features = len(weight)
        self.num_threads = num_threads

    def __call__(self, x: Activations) -> torch.Tensor:
        assert isinstance(x, torch.Tensor)  # it takes no quantised ones
        out = packed_linear(x.contiguous(), self.packed, _PLAIN_TERMS, self.num_threads)
        return out if self.bias is None else out.add_(self.bias)


class EncoderLoader(TensorLoader):
    """Reads float32 tensors: the encoders are small beside the language model, and exact.

    Args:
        num_threads: of the compiled products; `None` for products in plain torch.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, num_threads: int | None) -> None:
        super().__init__(checkpoint, torch.float32, device)
        self.num_threads = num_threads

    def shape(self, name: str) -> tuple[int, ...]:
        """As stored."""
        return tuple(self.checkpoint.tensor(name).shape)

    def count(self, prefix: str) -> int:
        """One more than the largest number behind `prefix`: how many layers there are."""
        found = (
            re.match(r"(\d+)\.", name.removeprefix(prefix))
            for name in self.checkpoint.tensor_names()
            if name.startswith(prefix)
        )
        return max((int(match[1]) + 1 for match in found if match), default=0)

    def table(self, name: str, rows: int, columns: int) -> torch.Tensor:
        """A matrix that is looked up in, [rows, columns]."""
        return self.weight(name, (rows, columns)).to_dense(self.dtype)

    def product(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
        """A layer from weight [rows, columns] and bias [rows]."""
        if self.num_threads is None:
            return Linear([DenseTensor(weight)], bias)
        return PackedProduct(weight, bias, self.num_threads)

    def linear(
        self, names: Sequence[str], sizes: Sequence[int], in_features: int, bias: bool = True
    ) -> Linear:
        """As `TensorLoader.linear`."""
        pairs = list(zip(names, sizes, strict=True))
        weight = torch.cat([self.table(name + ".weight", size, in_features) for name, size in pairs])
        biases = torch.cat([self.vector(name + ".bias", size) for name, size in pairs]) if bias else None
        return self.product(weight, biases)

    def norm(self, name: str, size: int, eps: float = 1e-5) -> LayerNorm:
        return LayerNorm(self.vector(name + ".weight", size), self.vector(name + ".bias", size), eps)
