"""What published layouts of quantised weights share: config fields, stored tensors, zero-point blocks."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from flexjudge_fast.errors import CheckpointError, UnsupportedCheckpointError
from flexjudge_fast.ops.linear_w8a8 import W8Matrix
from flexjudge_fast.weights.formats import find_format
from flexjudge_fast.weights.tensor import DenseTensor, QuantTensor, StoredWeight, Weight


class Fields:
    """An object of config.json. Fields are taken by name; what remains must be known to change no number.

    Args:
        data: the parsed object.
        where: the file and the way to the object in it, for messages.

    Raises:
        UnsupportedCheckpointError: it is no object.
    """

    def __init__(self, data: Any, where: str) -> None:
        if not isinstance(data, Mapping):
            raise UnsupportedCheckpointError(f"{where}: {data!r:.200}, an object is expected")
        self._left = {str(name): value for name, value in data.items()}
        self._where = where

    def take(self, name: str, default: Any = None) -> Any:
        """The value, or `default` where it is missing or null."""
        value = self._left.pop(name, None)
        return default if value is None else value

    def one_of(self, name: str, allowed: tuple[Any, ...], default: Any = None) -> Any:
        """The value, which must be one of `allowed`, in its type too."""
        value = self.take(name, default)
        if not any(type(value) is type(other) and value == other for other in allowed):
            raise self.error(name, value, f"only {' or '.join(map(repr, allowed))} is supported")
        return value

    def group_size(self, name: str = "group_size", default: int | None = None) -> int:
        """Columns that share a scale: a multiple of 32, or -1 for all of a row."""
        value = self.take(name, default)
        if type(value) is not int or (value != -1 and (value <= 0 or value % 32)):
            raise self.error(name, value, "only -1 and multiples of 32 are supported")
        return value

    def names(self, name: str) -> tuple[str, ...]:
        """A list of strings; empty where it is missing."""
        value = self.take(name, [])
        if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
            raise self.error(name, value, "a list of names is expected")
        return tuple(value)

    def child(self, name: str) -> "Fields":
        """An object inside this one."""
        return Fields(self._left.pop(name, None), f"{self._where}.{name}")

    def children(self, name: str) -> list["Fields"]:
        """The values of an object inside this one, which are objects."""
        inner = self.child(name)
        return [inner.child(key) for key in list(inner._left)]

    def finish(self, harmless: Collection[str]) -> None:
        """Refuse what was not taken, is not among `harmless`, and says something."""
        for name, value in self._left.items():
            says_nothing = value is None or value is False or value in ([], {})
            if name not in harmless and not says_nothing:
                raise self.error(name, value, "the field is unknown")

    def error(self, name: str, value: Any, reason: str) -> UnsupportedCheckpointError:
        return UnsupportedCheckpointError(f"{self._where}.{name}: {value!r:.200}, {reason}")


class Source(Protocol):
    """Where tensors are read from, as stored."""

    path: Path

    def stored_tensor(self, name: str) -> torch.Tensor:
        """CheckpointError when missing or broken."""


class Module:
    """The stored tensors of one quantised module, `name.part` each."""

    def __init__(self, source: Source, name: str, parts: frozenset[str]) -> None:
        self._source = source
        self.path = source.path
        self.name = name
        self.parts = parts

    def take(self, part: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int | None, ...]) -> torch.Tensor:
        """A tensor of one of these dtypes and this shape, where `None` stands for any size.

        Raises:
            CheckpointError: it is missing or another.
        """
        if part not in self.parts:
            raise self.error(part, "is missing")
        data = self.stored(part)
        if data.dtype not in dtypes:
            raise self.error(part, f"is {data.dtype}, {' or '.join(map(str, dtypes))} is expected")
        fits = data.dim() == len(shape) and all(
            wanted in (None, size) for wanted, size in zip(shape, data.shape, strict=True)
        )
        if not fits:
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            raise self.error(part, f"has shape {tuple(data.shape)}, [{wanted}] is expected")
        return data

    def stored(self, part: str) -> torch.Tensor:
        """A tensor that `take` has found good."""
        return self._source.stored_tensor(f"{self.name}.{part}")

    def error(self, part: str, reason: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: tensor {self.name}.{part} {reason}")

    def unsupported(self, part: str, reason: str) -> UnsupportedCheckpointError:
        return UnsupportedCheckpointError(f"{self.path}: tensor {self.name}.{part} {reason}")


class Layout(ABC):
    """How a published checkpoint stores its quantised modules.

    Attributes:
        summary: for people: method, bits, groups.
        parts: what the tensors of such a module are called, behind its name. One of them other than "weight"
            makes a module a quantised one.
        ignored: names in config.json of modules that are not quantised. Libraries match them in ways of their
            own, so that only whole names count here.
    """

    summary: str
    parts: tuple[str, ...]
    ignored: tuple[str, ...] = ()

    @abstractmethod
    def weight(self, module: Module) -> StoredWeight:
        """The module's matrix [out_features, in_features].

        Raises:
            CheckpointError: a tensor is missing or broken.
            UnsupportedCheckpointError: it asks for something that is not supported.
        """


SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def num_groups(module: Module, part: str, columns: int, group_size: int) -> int:
    """How many scales a row of `columns` has; `part` is the tensor to blame."""
    size = columns if group_size == -1 else group_size
    if not columns or columns % size:
        raise module.unsupported(part, f"has {columns} columns, no whole number of groups of {size}")
    if size % 32:
        raise module.unsupported(part, f"has {columns} columns, only multiples of 32 are supported")
    return columns // size


def check_groups(module: Module, part: str, columns: int, group_size: int) -> None:
    """Refuse a g_idx, int32 [columns], that is not the order of the columns themselves (act-order)."""
    if part not in module.parts:
        return
    found = module.take(part, (torch.int32, torch.int64), (columns,))
    plain = torch.arange(columns) // (columns if group_size == -1 else group_size)
    if not torch.equal(found.long(), plain):
        raise module.unsupported(
            part, "is not in the order of the columns (desc_act), which is not supported"
        )


def unpack_words(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes out of 32-bit words, the lowest bits first.

    Args:
        words: int32 [rows, n].
        bits: 4 or 8.

    Returns:
        uint8 [rows, n * 32 / bits].
    """
    data = words.contiguous().view(torch.uint8)
    return data if bits == 8 else torch.stack((data & 15, data >> 4), dim=-1).flatten(1)


def without_activations(matrix: W8Matrix, dtype: torch.dtype) -> Weight:
    """The same weights for activations that are not quantised to 8 bits token by token, as on a CPU.

    int8 becomes blocks, exactly. What blocks cannot hold (float8, rows of no whole number of blocks) becomes
    dense, each weight rounded to `dtype`.
    """
    rows, columns = matrix.shape
    if matrix.codes.dtype != torch.int8 or columns % 32:
        return DenseTensor(matrix.to_dense(dtype))
    codes = (matrix.codes.int() + 128).to(torch.uint8)
    zeros = torch.full((rows, 1), 128, dtype=torch.uint8, device=codes.device)
    return zero_point_weight(codes, matrix.scales.unsqueeze(1), zeros, 8)


def zero_point_weight(
    codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bits: int
) -> QuantTensor:
    """A matrix in blocks, each weight exactly scale * (code - zero).

    Args:
        codes: uint8 [rows, columns].
        scales: float [rows, groups], groups of a multiple of 32 columns.
        zeros: uint8 [rows, groups].
        bits: of a code, 4 or 8.
    """
    rows, columns = codes.shape
    group = columns // scales.shape[1]
    size = 32 if bits == 8 else next(n for n in (128, 64, 32) if group % n == 0)
    found = find_format(f"Z{bits}_{size}")
    assert found is not None
    repeat = group // size
    scales = scales.float().repeat_interleave(repeat, 1).unsqueeze(-1)  # [rows, blocks, 1]
    zeros = zeros.repeat_interleave(repeat, 1).unsqueeze(-1)
    data = codes.unflatten(1, (-1, size))  # [rows, blocks, size]
    if bits == 4:
        runs = data.unflatten(2, (-1, 2, 16))
        data = (runs[..., 0, :] | runs[..., 1, :] << 4).flatten(2)
    blocks = torch.cat((scales.contiguous().view(torch.uint8), zeros, data), dim=2).flatten(1)
    return QuantTensor(blocks, found, (rows, columns))
