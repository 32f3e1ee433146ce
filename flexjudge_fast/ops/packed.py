"""Matrices in the CPU kernels' reading order, and their products."""

import mmap
from dataclasses import dataclass

import torch

from flexjudge_fast.ops.dequantize import dequantize


@dataclass(frozen=True, eq=False)
class PackedMatrix:
    """A matrix [rows, columns] packed for the kernels (csrc/include/flexjudge/packed.h).

    data: uint8 [bytes].
    """

    data: torch.Tensor
    format_name: str
    rows: int
    columns: int


class WeightMemory:
    """One stretch of memory for all packed matrices, on huge pages where the system has them.

    Huge pages need fewer address translations: on 4 KiB pages a read of all weights is some 15% slower.
    """

    def __init__(self, num_bytes: int) -> None:
        pages = mmap.mmap(-1, num_bytes + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            pages.madvise(mmap.MADV_HUGEPAGE)
        memory = torch.frombuffer(pages, dtype=torch.uint8)  # keeps `pages` open
        self._free = memory[-memory.data_ptr() % _HUGE_PAGE :]

    def take(self, num_bytes: int) -> torch.Tensor:
        """The next uint8 [num_bytes]; packed sizes are multiples of 64, so each begins on a cache line."""
        taken, self._free = self._free[:num_bytes], self._free[num_bytes:]
        return taken


_HUGE_PAGE = 2 << 20


def packed_bytes(format_name: str, rows: int, columns: int) -> int:
    """Bytes of a packed matrix."""
    size: int = torch.ops.flexjudge.packed_bytes(format_name, rows, columns)
    return size


def pack(
    source: torch.Tensor, format_name: str, columns: int, memory: WeightMemory | None = None
) -> PackedMatrix:
    """Repack a weight; lossless.

    Args:
        source: rows as a checkpoint stores them, on the CPU: uint8 blocks [rows, bytes_per_row] of a
            quantised format, or float32, float16 or bfloat16 [rows, columns] ("F32", "F16", "BF16").
        memory: where the packed matrix is put; a tensor of its own when `None`.
    """
    rows, size = source.shape[0], packed_bytes(format_name, source.shape[0], columns)
    data = torch.empty(size, dtype=torch.uint8) if memory is None else memory.take(size)
    torch.ops.flexjudge.pack(source.contiguous(), format_name, rows, columns, data, torch.get_num_threads())
    return PackedMatrix(data, format_name, rows, columns)


def unpack(matrix: PackedMatrix, ids: torch.Tensor) -> torch.Tensor:
    """Rows of a packed matrix. ids: [n] int64. Returns float32 [n, columns]."""
    out: torch.Tensor = torch.ops.flexjudge.unpack(
        matrix.data, matrix.format_name, matrix.rows, matrix.columns, ids
    )
    return out


def packed_linear(x: torch.Tensor, weight: PackedMatrix, terms: int, threads: int) -> torch.Tensor:
    """`x @ weight.T` with activations quantised per 32 columns, if the weight is.

    Args:
        x: [num_tokens, columns] float32.
        terms: bytes of a quantised activation, 2 or 1.

    Returns:
        [num_tokens, rows] float32. A token's bits do not depend on the tokens beside it, nor on `threads`.
    """
    out: torch.Tensor = torch.ops.flexjudge.packed_linear(
        x, weight.data, weight.format_name, weight.rows, terms, threads
    )
    return out


def quantize_activations(x: torch.Tensor, terms: int) -> torch.Tensor:
    """What the kernels make of activations before a quantised product: the reference, in float64.

    Every 32 columns share a scale, their largest magnitude over 32512 (two bytes) or 127 (one).
    """
    groups = x.unflatten(-1, (-1, 32))
    limit = 127.0 * 256 if terms == 2 else 127.0
    largest = groups.abs().amax(-1, keepdim=True)
    inverse = torch.full_like(largest, limit) / largest  # `limit / largest` would round twice
    inverse = torch.where(largest > 0, inverse, 0.0)
    codes = (groups * inverse).round().double()
    out: torch.Tensor = (codes * (largest / limit).double()).flatten(-2)
    return out


def packed_linear_reference(
    x: torch.Tensor, source: torch.Tensor, format_name: str, terms: int
) -> torch.Tensor:
    """`packed_linear` in float64, from the weight as stored."""
    if source.dtype != torch.uint8:
        weight = source
    else:
        x, weight = quantize_activations(x, terms), dequantize(source, format_name)
    out: torch.Tensor = x.double() @ weight.double().T
    return out
