"""Models as the compiled ops read them: addresses and sizes in one row of numbers."""

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from flexjudge_fast.ops.packed import PackedMatrix


@dataclass(frozen=True, eq=False)
class PackedLinear:
    """Matrices over the same input, side by side, and a float32 bias [rows of all] or `None`."""

    parts: Sequence[PackedMatrix]
    bias: torch.Tensor | None


@dataclass(frozen=True, eq=False)
class PackedLayer:
    """One transformer block: attention and gated MLP behind norms, which are float32 [hidden]."""

    input_norm: torch.Tensor
    qkv: PackedLinear
    out: PackedLinear
    post_norm: torch.Tensor
    gate: PackedLinear
    up: PackedLinear
    down: PackedLinear


def float_number(value: float) -> int:
    """The bits of a double."""
    (bits,) = struct.unpack("q", struct.pack("d", value))
    assert isinstance(bits, int)
    return bits


def matrix_numbers(matrix: PackedMatrix) -> list[int]:
    format_id = torch.ops.flexjudge.format_id(matrix.format_name)
    return [matrix.data.data_ptr(), format_id, matrix.rows, matrix.columns]


def linear_numbers(linear: PackedLinear) -> list[int]:
    numbers = [len(linear.parts), 0 if linear.bias is None else linear.bias.data_ptr()]
    for part in linear.parts:
        numbers += matrix_numbers(part)
    return numbers


def layer_numbers(layer: PackedLayer) -> list[int]:
    numbers = [layer.input_norm.data_ptr(), *linear_numbers(layer.qkv), *linear_numbers(layer.out)]
    numbers += [layer.post_norm.data_ptr()]
    return numbers + [n for part in (layer.gate, layer.up, layer.down) for n in linear_numbers(part)]


def open_plan(opener: Callable[[torch.Tensor], int], numbers: Sequence[int]) -> int:
    """The handle under which the compiled side keeps the model; its memory must outlive it."""
    return opener(torch.tensor(numbers, dtype=torch.int64))
