"""Reads molecules in other processes, checks what those send, and remembers the last ones."""

import hashlib
import json
import socket
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flexjudge_fast.errors import MediaError, UnsupportedMediaError
from flexjudge_fast.media.molecule_limits import MoleculeLimits
from flexjudge_fast.media.worker_pool import FileSource, WorkerPool
from flexjudge_fast.media.worker_wire import WireError, receive, receive_into
from flexjudge_fast.models.molecule_stm import EDGE_SIZES, NODE_SIZES

_REMEMBERED = 256  # molecules: atoms are placed once, however often one is judged
_MOST_BONDS = 8  # for each atom
_FARTHEST = 1e4  # Angstrom


@dataclass(frozen=True, eq=False)
class DecodedMolecule:
    """What a worker made of a molecule, checked.

    Args:
        symbols: of the m atoms that have places; with hydrogen where the caller gave it.
        coordinates: float64 [m, 3], in Angstrom.
        nodes: int64 [n, 9], features of the atoms without hydrogen.
        bonds: int64 [b, 5]: both atoms, then type, stereo and whether it is conjugated.
    """

    symbols: tuple[str, ...]
    coordinates: NDArray[np.float64]
    nodes: NDArray[np.int64]
    bonds: NDArray[np.int64]


class MoleculeDecoder(WorkerPool):
    """Reads untrusted molecules in other processes. Safe to use from several threads, and after a fork.

    Args:
        limits: what is refused.
        num_workers: processes at most, each up to `limits.max_memory_bytes`; further threads wait.
    """

    def __init__(self, limits: MoleculeLimits | None = None, num_workers: int = 2) -> None:
        self.limits = limits or MoleculeLimits()
        super().__init__("flexjudge_fast.media.molecule_decode", self.limits.max_memory_bytes, num_workers)

    def _reset(self) -> None:
        super()._reset()
        self._found: OrderedDict[bytes, Future[DecodedMolecule]] = OrderedDict()
        self._finding = threading.Lock()

    def decode(self, source: FileSource, **given: Any) -> DecodedMolecule:
        """A molecule with places of its atoms.

        Args:
            source: path or bytes.
            given: `form`, `symbols`, `coordinates` and `charge`, see `molecule_decode.messages`.

        Raises:
            MediaError: it cannot be read or is over a limit, its atoms cannot be placed, or doing so crashed
                or hung.
            UnsupportedMediaError: RDKit is not installed.
            EngineStateError: this decoder is closed.
        """
        if "rdkit" not in sys.modules and find_spec("rdkit") is None:
            raise UnsupportedMediaError(
                'molecules are read with RDKit, which is missing: pip install "flexjudge_fast[molecules]"'
            )
        if not isinstance(source, bytes):  # a file may change
            return self._decode(source, given)
        self._leave_parent()
        asked = json.dumps(given, sort_keys=True).encode()
        key = hashlib.sha256(len(asked).to_bytes(8, "little") + asked + source).digest()
        return self._remembered(key, lambda: self._decode(source, given))

    def _remembered(self, key: bytes, find: Callable[[], DecodedMolecule]) -> DecodedMolecule:
        """What `find` gives, which runs once for several threads that ask. Errors are forgotten."""
        with self._finding:
            future = self._found.get(key)
            is_ours = future is None
            if future is None:
                future = self._found[key] = Future()
            self._found.move_to_end(key)
            while len(self._found) > _REMEMBERED:
                self._found.popitem(last=False)
        if not is_ours:
            return future.result()
        try:
            molecule = find()
        except BaseException as error:
            with self._finding:
                self._found.pop(key, None)
            future.set_exception(error)
            raise
        future.set_result(molecule)
        return molecule

    def _decode(self, source: FileSource, given: dict[str, Any]) -> DecodedMolecule:
        reply = _Reply(self.limits)
        request = {"limits": asdict(self.limits), **given}
        self.run(source, self.limits.check_file, request, reply, self.limits.timeout)
        assert reply.molecule is not None
        return reply.molecule


class _Reply:
    """What a worker sends for one molecule. It is not believed: whoever took it over may send anything."""

    def __init__(self, limits: MoleculeLimits) -> None:
        self.limits = limits
        self.is_parsed = False
        self.molecule: DecodedMolecule | None = None
        self.error: str | None = None
        self.healthy = False

    @property
    def done(self) -> bool:
        return self.molecule is not None

    def take(self, peer: socket.socket, deadline: float) -> None:
        """Reads one message. WireError: nonsense, or the end of the stream. MediaError: over a limit."""
        if not self.is_parsed:
            soon = min(deadline, time.monotonic() + self.limits.parse_timeout)
            try:
                header, _ = receive(peer, deadline=soon)
            except TimeoutError as late:
                raise MediaError(f"parsing takes longer than {self.limits.parse_timeout:g} s") from late
        else:
            header, _ = receive(peer, deadline=deadline)
        match header:
            case {"parsed": True} if not self.is_parsed:
                self.is_parsed = True
            case {"molecule": list(symbols), "num_atoms": int(atoms), "num_bonds": int(bonds)}:
                if not self.is_parsed or not all(isinstance(s, str) and 0 < len(s) < 4 for s in symbols):
                    raise WireError("a molecule that is none")
                self.molecule = self._read(peer, deadline, symbols, atoms, bonds)
            case {"error": str(error), "healthy": bool(healthy)}:
                self.error, self.healthy = error, healthy
            case _:
                raise WireError("a message that is none")

    def _read(
        self, peer: socket.socket, deadline: float, symbols: list[str], num_atoms: int, num_bonds: int
    ) -> DecodedMolecule:
        self.limits.check_atoms(sum(symbol != "H" for symbol in symbols), len(symbols))
        self.limits.check_atoms(0, num_atoms)
        if not 0 <= num_bonds <= _MOST_BONDS * num_atoms:
            raise WireError("bonds that do not fit")
        arrays: list[NDArray[Any]] = [
            np.empty((num_atoms, len(NODE_SIZES)), "<i8"),
            np.empty((num_bonds, 2 + len(EDGE_SIZES)), "<i8"),
            np.empty((len(symbols), 3), "<f8"),
        ]
        for array in arrays:
            if array.size:
                receive_into(peer, array.data.cast("B"), deadline)
        nodes, bonds, places = arrays
        _check_range(nodes, NODE_SIZES)
        _check_range(bonds, (num_atoms, num_atoms, *EDGE_SIZES))
        check_places(places)
        return DecodedMolecule(tuple(symbols), places, nodes, bonds)


def _check_range(array: NDArray[Any], sizes: tuple[int, ...]) -> None:
    if array.size and ((array < 0) | (array >= np.array(sizes))).any():
        raise WireError("a feature out of its range")


def check_places(places: NDArray[Any]) -> None:
    """MediaError: no places [n, 3] that atoms can have."""
    if places.ndim != 2 or places.shape[1] != 3:
        raise MediaError(f"coordinates of shape {list(places.shape)}; give [num_atoms, 3]")
    if not (np.abs(places) <= _FARTHEST).all():  # NaN is not, either
        raise MediaError(f"a coordinate is not finite, or beyond {_FARTHEST:g} Angstrom")
    if len(places) > 1 and (places == places[0]).all():
        raise MediaError("all atoms are at the same place")
