"""Checks a GGUF file's header against its size, before a reader that trusts it loops over its counts."""

import mmap
import struct
from pathlib import Path

import gguf

from flexjudge_fast.errors import CheckpointError, UnsupportedCheckpointError

_MAX_ENTRIES = 1 << 16  # metadata keys, or tensors; published models have hundreds
_MAX_ELEMENTS = 1 << 22  # of all arrays together; published vocabularies with merges have under a million
_MAX_DIMENSIONS = 4  # ggml's own bound
_STRING, _ARRAY = 8, 9
_SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_DEFAULT_ALIGNMENT = 32


def check_header(path: Path) -> None:
    """Walk metadata and tensor table once; nothing is kept.

    Raises:
        CheckpointError: not GGUF, truncated (the tensor is named), or a count that cannot be true.
        UnsupportedCheckpointError: a version, byte order or tensor type that this package cannot read.
    """
    try:
        with path.open("rb") as file:
            magic = file.read(4)
            if magic != b"GGUF":
                raise CheckpointError(f"{path}: not a GGUF file (it begins with {magic!r})")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                _Walk(path, data).check()
    except OSError as error:
        raise CheckpointError(f"{path}: {error}") from error


class _Walk:
    """A position in the mapped file that never leaves it."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._at = 4  # after the magic
        self._elements = 0
        self._alignment = _DEFAULT_ALIGNMENT

    def check(self) -> None:
        version = self._number("I")
        if version not in (2, 3):
            raise UnsupportedCheckpointError(
                f"{self._path}: GGUF version {version} is not supported (little-endian 2 and 3 are)"
            )
        num_tensors, num_keys = self._number("Q"), self._number("Q")
        if max(num_tensors, num_keys) > _MAX_ENTRIES:
            raise self._broken(f"{num_keys} metadata keys and {num_tensors} tensors are more than can be")
        for _ in range(num_keys):
            self._key_and_value()
        tensors = [self._tensor() for _ in range(num_tensors)]
        start = -(-self._at // self._alignment) * self._alignment
        for name, offset, num_bytes in tensors:
            if start + offset + num_bytes > len(self._data):
                raise self._broken(f"the data of tensor {name} ends behind the end of the file")

    def _key_and_value(self) -> None:
        key = self._string()
        kind = self._number("I")
        if key == b"general.alignment":
            if kind != 4:  # uint32
                raise self._broken("general.alignment is not a uint32")
            self._alignment = self._number("I")
            if self._alignment == 0 or self._alignment & (self._alignment - 1):
                raise self._broken(f"general.alignment {self._alignment} is not a power of two")
        elif kind == _ARRAY:
            self._array()
        else:
            self._value(kind)

    def _value(self, kind: int) -> None:
        if kind == _STRING:
            self._string()
        elif kind in _SCALAR_BYTES:
            self._skip(_SCALAR_BYTES[kind])
        else:
            raise self._broken(f"unknown metadata type {kind}, or an array in an array")

    def _array(self) -> None:
        kind, length = self._number("I"), self._number("Q")
        self._elements += length
        if self._elements > _MAX_ELEMENTS:
            raise self._broken(f"an array of {length} elements is longer than can be")
        if kind in _SCALAR_BYTES:
            self._skip(length * _SCALAR_BYTES[kind])
            return
        for _ in range(length):
            self._value(kind)

    def _tensor(self) -> tuple[str, int, int]:
        """Name, offset and size in bytes."""
        name = self._string().decode("utf-8", errors="backslashreplace")
        num_dimensions = self._number("I")
        if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
            raise self._broken(f"tensor {name} has {num_dimensions} dimensions")
        shape = [self._number("Q") for _ in range(num_dimensions)]
        kind, offset = self._number("I"), self._number("Q")
        num_elements = 1
        for size in shape:
            num_elements *= size
        if num_elements == 0:
            raise self._broken(f"tensor {name} of shape {shape[::-1]} is empty")
        try:
            block_size, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
        except (KeyError, ValueError) as error:
            raise UnsupportedCheckpointError(
                f"{self._path}: tensor {name} has the unknown type {kind}"
            ) from error
        if shape[0] % block_size:
            raise self._broken(f"tensor {name}: rows of {shape[0]} are not whole blocks of {block_size}")
        return name, offset, num_elements // block_size * block_bytes

    def _string(self) -> bytes:
        length = self._number("Q")
        start = self._at
        self._skip(length)
        return self._data[start : self._at]

    def _number(self, code: str) -> int:
        start = self._at
        self._skip(struct.calcsize(code))
        number: int = struct.unpack_from("<" + code, self._data, start)[0]
        return number

    def _skip(self, num_bytes: int) -> None:
        if num_bytes > len(self._data) - self._at:
            raise self._broken(f"the header needs {num_bytes} more bytes at byte {self._at}, where it ends")
        self._at += num_bytes

    def _broken(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{self._path}: truncated or corrupt GGUF: {reason}")
