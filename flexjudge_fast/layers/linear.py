"""A linear layer that knows the format of its weight."""

from collections.abc import Sequence

import torch

from flexjudge_fast.ops.linear import linear, quantized_linear
from flexjudge_fast.weights.tensor import DenseTensor, QuantTensor, Weight


class Linear:
    """`x @ weight.T + bias`, the weight kept as stored (dense or quantised blocks).

    Several weights can share one layer (q, k and v; gate and up): their outputs stand side by side. With
    `merge`, neighbours of the same format become one matrix.
    """

    def __init__(
        self, weights: Sequence[Weight], bias: torch.Tensor | None = None, merge: bool = True
    ) -> None:
        self.weights = _merge(weights) if merge else list(weights)
        self.bias = bias  # [out_features]
        self.out_features = sum(w.shape[0] for w in self.weights)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[num_tokens, in_features] to [num_tokens, out_features], same dtype."""
        parts = [_apply(x, w) for w in self.weights]
        out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        return out if self.bias is None else out + self.bias

    @property
    def nbytes(self) -> int:
        return sum(w.nbytes for w in self.weights) + (0 if self.bias is None else self.bias.nbytes)


def _apply(x: torch.Tensor, weight: Weight) -> torch.Tensor:
    if isinstance(weight, QuantTensor):
        return quantized_linear(x, weight.blocks, weight.format.name)
    return linear(x, weight.data)


def _merge(weights: Sequence[Weight]) -> list[Weight]:
    """Concatenate neighbours of one format along the output rows."""
    merged: list[Weight] = []
    for weight in weights:
        last = merged[-1] if merged else None
        if isinstance(last, DenseTensor) and isinstance(weight, DenseTensor):
            merged[-1] = DenseTensor(torch.cat((last.data, weight.data)))
        elif (
            isinstance(last, QuantTensor) and isinstance(weight, QuantTensor) and last.format == weight.format
        ):
            shape = (last.shape[0] + weight.shape[0], last.shape[1])
            merged[-1] = QuantTensor(torch.cat((last.blocks, weight.blocks)), last.format, shape)
        else:
            merged.append(weight)
    return merged
