"""Keeps encoder embeddings in a folder that processes share: one checksummed file each, bounded in size."""

import errno
import hashlib
import os
import re
import stat
import struct
import sys
import tempfile
import time
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from flexjudge_fast.engine.config import DTYPES
from flexjudge_fast.errors import InvalidArgumentError

# Part of every name and checksum: what another layout or byte order wrote is never found.
_LAYOUT = b"flexjudge embeddings 1 " + sys.byteorder.encode()
_SHAPE = struct.Struct("=8sQQ")  # dtype name, num_tokens, hidden
_CHECKSUM_BYTES = 32
_HEADER_BYTES = _CHECKSUM_BYTES + _SHAPE.size
_ENTRY_NAME = re.compile(r"[0-9a-f]{64}\.embeddings")
_PREFIX, _SUFFIX = "flexjudge-", ".embeddings.tmp"  # of a file that is being written
_TEMPORARY_SECONDS = 3600  # an older temporary file belongs to a process that died
_STEPS = 16  # the folder is listed again after writing this part of the bound


@dataclass(frozen=True)
class _Listed:
    """A file of ours in the folder. `is_entry` is False for one that is still being written."""

    path: str
    num_bytes: int
    mtime_ns: int
    is_entry: bool


class EncoderStore:
    """A folder of embeddings by content key. Files are only ever added whole or removed, so no locks.

    A file holds a checksum, dtype and shape, then the numbers. The checksum covers all of that and is keyed
    with salt and content key; it is verified on every read. A file that is truncated, changed, or another
    entry's is removed and counts as absent. With a secret salt nobody else can make a file that is accepted.

    Args:
        folder: made if it is missing, for this user only. Other files in it are left alone.
        max_bytes: bound on all entries. The least recently written or read go first, whoever wrote them.
            Processes that write side by side can exceed it by a sixteenth, or one entry, each.
        salt: part of every entry's name; processes share entries only if theirs are equal.

    Raises:
        InvalidArgumentError: the folder cannot be made or listed; names `encoder_cache_dir`.
    """

    def __init__(self, folder: Path, max_bytes: int, salt: bytes) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self._salt = salt
        self._step = max_bytes // _STEPS
        self._is_writable = True
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._unlisted_bytes = self._make_room(0)
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            raise InvalidArgumentError(
                f"encoder_cache_dir={str(folder)!r}: cannot be used as a folder: {error}"
            ) from error

    def get(self, key: bytes) -> torch.Tensor | None:
        """The embeddings [num_tokens, hidden] on the CPU, or None. Never raises for what the folder holds."""
        path, secret = self._locate(key)
        try:
            # A link could point anywhere, and opening a pipe would wait for its writer.
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            if error.errno == errno.ELOOP:
                _remove(path)
            return None
        try:
            embeddings = self._read(descriptor, secret)
        except OSError:  # the disk failed, which says nothing about the file
            return None
        finally:
            os.close(descriptor)
        if embeddings is None:
            _remove(path)
        return embeddings

    def put(self, key: bytes, embeddings: torch.Tensor) -> None:
        """Keep `embeddings` [num_tokens, hidden], of a dtype in `DTYPES`, unless they alone exceed the bound.

        A failing disk is no error: the first failure warns, and nothing is written from then on.
        """
        if not self._is_writable or _HEADER_BYTES + embeddings.nbytes > self.max_bytes:
            return
        try:
            self._write(key, embeddings)
        except OSError as error:
            self._is_writable = False
            warnings.warn(
                f"encoder_cache_dir={str(self.folder)!r}: {error}; no more embeddings are written there",
                RuntimeWarning,
                stacklevel=2,
            )

    def _locate(self, key: bytes) -> tuple[str, bytes]:
        """The path of an entry, and the key of its checksum, which the path does not give away."""
        salted = len(self._salt).to_bytes(8, "little") + self._salt + key
        digest = hashlib.blake2b(_LAYOUT + salted).digest()
        return os.path.join(self.folder, digest[:32].hex() + ".embeddings"), digest[32:]

    def _read(self, descriptor: int, secret: bytes) -> torch.Tensor | None:
        """The embeddings of an open file, marked as just used; None unless its checksum is right."""
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or not _HEADER_BYTES <= status.st_size <= self.max_bytes:
            return None
        data = torch.empty(status.st_size - _HEADER_BYTES, dtype=torch.uint8)
        with open(descriptor, "rb", closefd=False) as file:
            header = file.read(_HEADER_BYTES)
            file.readinto(data.numpy().data)  # if the file has become shorter, the checksum is wrong
        checksum, shape = header[:_CHECKSUM_BYTES], header[_CHECKSUM_BYTES:]
        if checksum != _checksum(secret, shape, data):
            return None
        with suppress(OSError):  # then it only looks older than it is
            os.utime(descriptor)
        name, num_tokens, hidden = _SHAPE.unpack(shape)
        return data.view(DTYPES[name.rstrip(b"\0").decode()]).reshape(num_tokens, hidden)

    def _write(self, key: bytes, embeddings: torch.Tensor) -> None:
        """Write a temporary file and rename it; raises OSError.

        Without fsync: a power cut may leave a renamed file without its data, and the checksum finds that out.
        """
        path, secret = self._locate(key)
        num_tokens, hidden = embeddings.shape
        name = str(embeddings.dtype).removeprefix("torch.").encode()
        shape = _SHAPE.pack(name, num_tokens, hidden)
        data = embeddings.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        size = _HEADER_BYTES + data.nbytes
        if size > self._unlisted_bytes:
            # At least a step, so that a full folder of small entries isn't listed at every put.
            self._unlisted_bytes = self._make_room(max(size, self._step))
        if size > self._unlisted_bytes:  # taken by files that cannot be removed, or are being written
            return
        self._unlisted_bytes -= size
        descriptor, temporary = tempfile.mkstemp(_SUFFIX, _PREFIX, self.folder)
        try:
            with open(descriptor, "wb") as file:
                file.write(_checksum(secret, shape, data) + shape)
                file.write(data.numpy().data)
            os.replace(temporary, path)
        except BaseException:
            _remove(temporary)
            raise

    def _make_room(self, wanted: int) -> int:
        """Remove the least recently used entries until `wanted` bytes are free.

        Returns how many bytes may be written before the folder is listed again; other processes write too.
        """
        listed = self._list()
        total = sum(file.num_bytes for file in listed)
        for file in sorted(listed, key=lambda file: file.mtime_ns):
            if total + wanted <= self.max_bytes:
                break
            if file.is_entry and _remove(file.path):
                total -= file.num_bytes
        return min(self.max_bytes - total, max(wanted, self._step))

    def _list(self) -> list[_Listed]:
        """Our files in the folder, less the temporary ones of processes that died, which are removed."""
        oldest_ns = time.time_ns() - _TEMPORARY_SECONDS * 10**9
        listed = []
        with os.scandir(self.folder) as found:
            for item in found:
                is_entry = _ENTRY_NAME.fullmatch(item.name) is not None
                is_temporary = item.name.startswith(_PREFIX) and item.name.endswith(_SUFFIX)
                if not (is_entry or is_temporary):
                    continue
                try:
                    status = item.stat(follow_symlinks=False)
                except FileNotFoundError:  # another process was faster
                    continue
                if is_temporary and status.st_mtime_ns < oldest_ns and _remove(item.path):
                    continue
                listed.append(_Listed(item.path, status.st_size, status.st_mtime_ns, is_entry))
        return listed


def _checksum(secret: bytes, shape: bytes, data: torch.Tensor) -> bytes:
    """Keyed BLAKE2b-256 of the packed dtype and shape, and of the numbers as uint8 [num_bytes] on the CPU."""
    h = hashlib.blake2b(shape, key=secret, digest_size=_CHECKSUM_BYTES)
    h.update(data.numpy().data)
    return h.digest()


def _remove(path: str) -> bool:
    """Unlink a file; True if it is gone, whoever removed it."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True
