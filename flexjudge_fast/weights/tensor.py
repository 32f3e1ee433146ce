"""A weight as it is kept in memory: dense, or quantised blocks."""

from dataclasses import dataclass

import torch

from flexjudge_fast.ops.dequantize import dequantize
from flexjudge_fast.weights.formats import QuantFormat


@dataclass(frozen=True, eq=False)
class DenseTensor:
    """An ordinary tensor of any float dtype."""

    data: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.data.shape)

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def to_dense(self, dtype: torch.dtype) -> torch.Tensor:
        return self.data.to(dtype)

    def to(self, device: torch.device) -> "DenseTensor":
        return DenseTensor(self.data.to(device))


@dataclass(frozen=True, eq=False)
class QuantTensor:
    """A matrix [rows, columns] in a block format: `blocks` is uint8 [rows, bytes per row]."""

    blocks: torch.Tensor
    format: QuantFormat
    shape: tuple[int, int]

    @property
    def nbytes(self) -> int:
        return self.blocks.nbytes

    def rows(self, start: int, stop: int) -> "QuantTensor":
        return QuantTensor(self.blocks[start:stop], self.format, (stop - start, self.shape[1]))

    def to_dense(self, dtype: torch.dtype) -> torch.Tensor:
        """[rows, columns] in `dtype`."""
        return dequantize(self.blocks, self.format.name).to(dtype)

    def to(self, device: torch.device) -> "QuantTensor":
        return QuantTensor(self.blocks.to(device), self.format, self.shape)


Weight = DenseTensor | QuantTensor
