"""Takes a model's tensors out of a checkpoint: names, shapes and finiteness checked, dtype and device set."""

from collections.abc import Sequence

import torch

from flexjudge_fast.errors import CheckpointError
from flexjudge_fast.layers.linear import Linear
from flexjudge_fast.ops.linear_w8a8 import W8Matrix, has_w8a8
from flexjudge_fast.weights.checkpoint import Checkpoint
from flexjudge_fast.weights.layout import without_activations
from flexjudge_fast.weights.quantization import ActivationQuantization, Quantization
from flexjudge_fast.weights.tensor import DenseTensor, StoredWeight, Weight


class TensorLoader:
    """Reads tensors by name from `checkpoint`.

    Args:
        expand: turn quantised weights into dense ones.
        quantization: quantise dense weights, or them and activations.
        merge: join the weights of one layer into one matrix where their formats agree.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        expand: bool = False,
        merge: bool = True,
        quantization: Quantization | ActivationQuantization | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.dtype = dtype
        self.device = device
        self.expand = expand
        self.merge = merge
        self.quantization = quantization

    def prefix(self, candidates: Sequence[str], name: str) -> str:
        """The candidate under which the checkpoint has the tensor `name`; the first one if none fits."""
        names = self.checkpoint.tensor_names()
        return next((prefix for prefix in candidates if prefix + name in names), candidates[0])

    def weight(self, name: str, shape: tuple[int, ...]) -> Weight:
        """The tensor `name`; dense ones come in the loader's dtype.

        Raises:
            CheckpointError: the tensor is missing, has another shape, or holds NaN or infinity.
        """
        weight = self._read(name, shape)
        return self._plain(name, weight) if isinstance(weight, W8Matrix) else weight

    def _read(self, name: str, shape: tuple[int, ...]) -> StoredWeight:
        """The same, of whatever kind the checkpoint has it."""
        weight = self.checkpoint.tensor(name)
        if tuple(weight.shape) != shape:
            raise CheckpointError(
                f"{self.checkpoint.path}: tensor {name} has shape {tuple(weight.shape)}, "
                f"config.json asks for {shape}"
            )
        if isinstance(self.quantization, Quantization):
            weight = self.quantization.apply(name, weight)
        if isinstance(weight, DenseTensor) or self.expand:
            weight = DenseTensor(weight.to_dense(self.dtype))
        if not weight.is_finite():
            raise CheckpointError(f"{self.checkpoint.path}: tensor {name} holds NaN or infinite values")
        return weight.to(self.device)

    def _fitting(self, name: str, weight: StoredWeight) -> StoredWeight:
        """With 8-bit activations only where the device multiplies them."""
        if isinstance(weight, W8Matrix) and not has_w8a8(self.device, weight.codes.dtype):
            return self._plain(name, weight)
        return weight

    def _plain(self, name: str, weight: W8Matrix) -> Weight:
        """Without 8-bit activations. CheckpointError: the loader's dtype does not hold the weights."""
        plain = without_activations(weight, self.dtype)
        if not plain.is_finite():
            raise CheckpointError(
                f"{self.checkpoint.path}: tensor {name} has values that {self.dtype} does not hold"
            )
        return plain

    def vector(self, name: str, size: int) -> torch.Tensor:
        """A norm weight or bias, [size], in the loader's dtype."""
        return self.weight(name, (size,)).to_dense(self.dtype)

    def linear(self, names: Sequence[str], sizes: Sequence[int], in_features: int, bias: bool) -> Linear:
        """One layer out of `names[i] + ".weight"` [sizes[i], in_features], side by side, and their biases."""
        pairs = list(zip(names, sizes, strict=True))
        stored = [self._read(name + ".weight", (size, in_features)) for name, size in pairs]
        weights = [self._fitting(n + ".weight", w) for n, w in zip(names, stored, strict=True)]
        biases = torch.cat([self.vector(name + ".bias", size) for name, size in pairs]) if bias else None
        eight_bits = None
        if isinstance(self.quantization, ActivationQuantization):
            eight_bits = self.quantization.dtype_of(names[0] + ".weight", weights[0])
        return Linear(weights, biases, self.merge, eight_bits)
