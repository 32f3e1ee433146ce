"""A weight as it is kept in memory: dense, quantised blocks, or 8 bits beside 8-bit activations."""

from dataclasses import dataclass

import torch

from flexjudge_fast.ops.dequantize import dequantize, read_floats
from flexjudge_fast.ops.linear_w8a8 import W8Matrix
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

    def is_finite(self) -> bool:
        """No NaN or infinity anywhere."""
        return bool(torch.isfinite(self.data).all())

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

    def is_finite(self) -> bool:
        """No NaN or infinity anywhere: codes are integers, so that scales and offsets alone can hold them."""
        blocks = self.blocks.unflatten(1, (-1, self.format.block_bytes))  # [rows, num_blocks, block_bytes]
        halves = (
            blocks[:, :, at : at + 2].contiguous().view(torch.float16) for at in self.format.half_offsets
        )
        floats = (read_floats(blocks[:, :, at : at + 4]) for at in self.format.float_offsets)
        return all(bool(torch.isfinite(numbers).all()) for numbers in (*halves, *floats))

    def to_dense(self, dtype: torch.dtype) -> torch.Tensor:
        """[rows, columns] in `dtype`."""
        return dequantize(self.blocks, self.format.name).to(dtype)

    def to(self, device: torch.device) -> "QuantTensor":
        return QuantTensor(self.blocks.to(device), self.format, self.shape)


Weight = DenseTensor | QuantTensor
# What a checkpoint holds; a matrix of 8 bits asks for activations of 8 bits as well, which GPUs do.
StoredWeight = Weight | W8Matrix
