"""A linear layer that knows the format of its weight."""

import warnings
from collections.abc import Sequence

import torch

from flexjudge_fast.ops.backend import uses_triton
from flexjudge_fast.ops.linear import linear, quantized_linear
from flexjudge_fast.ops.linear_w4a16 import (
    W4_FORMATS,
    InexactScalesError,
    W4Matrix,
    linear_w4a16,
    repack_w4_blocks,
)
from flexjudge_fast.ops.linear_w8a8 import (
    QuantizedTokens,
    W8Matrix,
    linear_w8a8,
    quantize_tokens,
    repack_w8,
)
from flexjudge_fast.weights.tensor import DenseTensor, QuantTensor, StoredWeight, Weight

Activations = torch.Tensor | QuantizedTokens  # [num_tokens, features]
Matrix = DenseTensor | QuantTensor | W4Matrix | W8Matrix


class Linear:
    """`x @ weight.T + bias`; the weight is kept as stored (dense or in blocks), or as GPU kernels read it.

    Several weights can share one layer (q, k and v; gate and up): their outputs stand side by side. With
    `merge`, neighbours of the same format become one matrix.

    Args:
        eight_bits: int8 or float8_e4m3fn: dense weights are quantised to it, and activations on their way in.
    """

    def __init__(
        self,
        weights: Sequence[StoredWeight],
        bias: torch.Tensor | None = None,
        merge: bool = True,
        eight_bits: torch.dtype | None = None,
    ) -> None:
        self.matrices = [_repack(w, eight_bits) for w in (_merge(weights) if merge else weights)]
        self.bias = bias  # [out_features]
        self.out_features = sum(m.shape[0] for m in self.matrices)
        # What activations are quantised to, if all its matrices want the same.
        types = {m.codes.dtype if isinstance(m, W8Matrix) else None for m in self.matrices}
        self.takes = types.pop() if len(types) == 1 else None

    @property
    def weights(self) -> list[Weight]:
        """Those that are kept as stored, which on a CPU are all of them."""
        return [m for m in self.matrices if isinstance(m, DenseTensor | QuantTensor)]

    def __call__(self, x: Activations) -> torch.Tensor:
        """[num_tokens, in_features], plain or as it `takes` them, to [num_tokens, out_features]."""
        if len(self.matrices) == 1:
            return _apply(x, self.matrices[0], self.bias)
        out = torch.cat([_apply(x, matrix, None) for matrix in self.matrices], dim=-1)
        return out if self.bias is None else out + self.bias

    @property
    def nbytes(self) -> int:
        return sum(m.nbytes for m in self.matrices) + (0 if self.bias is None else self.bias.nbytes)


def _apply(x: Activations, matrix: Matrix, bias: torch.Tensor | None) -> torch.Tensor:
    if isinstance(matrix, W8Matrix):
        if not isinstance(x, QuantizedTokens):
            x = QuantizedTokens(*quantize_tokens(x, matrix.codes.dtype), x.dtype)
        return linear_w8a8(x.codes, x.scales, matrix, bias, x.dtype)
    if isinstance(x, QuantizedTokens):
        raise TypeError("quantised activations for a weight that has none")
    if isinstance(matrix, DenseTensor):
        return linear(x, matrix.data, bias)
    if isinstance(matrix, W4Matrix):
        return linear_w4a16(x, matrix, bias)
    out = quantized_linear(x, matrix.blocks, matrix.format.name)
    return out if bias is None else out + bias


def _repack(weight: StoredWeight, eight_bits: torch.dtype | None) -> Matrix:
    """As the kernel that will read it wants it: once, when the model is loaded."""
    if isinstance(weight, W8Matrix):
        return weight
    if isinstance(weight, DenseTensor):
        return weight if eight_bits is None else repack_w8(weight.data, eight_bits)
    if weight.format.name in W4_FORMATS and uses_triton(weight.blocks):
        try:
            return repack_w4_blocks(weight.blocks, weight.format.name)
        except InexactScalesError as error:
            warnings.warn(f"a 4-bit weight is expanded at each use, slowly: {error}", stacklevel=2)
    return weight


def _merge(weights: Sequence[StoredWeight]) -> list[StoredWeight]:
    """Concatenate neighbours of one format along the output rows."""
    merged: list[StoredWeight] = []
    for weight in weights:
        last = merged[-1] if merged else None
        if isinstance(last, DenseTensor) and isinstance(weight, DenseTensor):
            merged[-1] = DenseTensor(torch.cat((last.data, weight.data)))
        elif (
            isinstance(last, QuantTensor) and isinstance(weight, QuantTensor) and last.format == weight.format
        ):
            shape = (last.shape[0] + weight.shape[0], last.shape[1])
            merged[-1] = QuantTensor(torch.cat((last.blocks, weight.blocks)), last.format, shape)
        elif (
            isinstance(last, W8Matrix)
            and isinstance(weight, W8Matrix)
            and last.codes.dtype == weight.codes.dtype
        ):
            merged[-1] = W8Matrix(
                torch.cat((last.codes, weight.codes)), torch.cat((last.scales, weight.scales))
            )
        else:
            merged.append(weight)
    return merged
