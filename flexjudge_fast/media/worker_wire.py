"""Messages between the engine and the processes that decode media: a length, a JSON object, then raw bytes.

Both ends are one Unix socket. A medium travels as an open file descriptor beside the request, so that the
process that decodes never opens a file by name.
"""

import json
import socket
import time
from typing import Any

_LENGTH = 4  # bytes of a header's length, little-endian
_MAX_HEADER = 1 << 18


class WireError(Exception):
    """The other end is gone, or does not speak this protocol."""


def send(peer: socket.socket, header: dict[str, Any], payload: bytes = b"", fd: int | None = None) -> None:
    """Sends a header, with an open file where `fd` is given, then `payload`, whose size the header tells."""
    text = json.dumps(header, allow_nan=False).encode()
    data = len(text).to_bytes(_LENGTH, "little") + text
    if fd is not None:
        data = data[socket.send_fds(peer, [data], [fd]) :]
    peer.sendall(data)
    if payload:
        peer.sendall(payload)


def receive(
    peer: socket.socket, with_fd: bool = False, deadline: float | None = None
) -> tuple[dict[str, Any], int | None]:
    """The next header, and the file descriptor that came with it if `with_fd`.

    Raises:
        TimeoutError: `time.monotonic()` reached `deadline`.
        WireError: the other end closed, or the header is too long or not a JSON object.
    """
    length = bytearray(_LENGTH)
    fds: list[int] = []
    start = 0
    if with_fd:
        data, fds, _, _ = socket.recv_fds(peer, _LENGTH, 1)
        length[: len(data)] = data
        start = len(data)
        if not start:
            raise WireError("the other end closed")
    receive_into(peer, memoryview(length)[start:], deadline)
    num_bytes = int.from_bytes(length, "little")
    if num_bytes > _MAX_HEADER:
        raise WireError(f"a header of {num_bytes} bytes")
    text = bytearray(num_bytes)
    receive_into(peer, memoryview(text), deadline)
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise WireError("a header that is not JSON") from error
    if not isinstance(header, dict):
        raise WireError("a header that is not an object")
    return header, fds[0] if fds else None


def receive_into(peer: socket.socket, view: memoryview, deadline: float | None = None) -> None:
    """Fills `view`. TimeoutError: the deadline came first. WireError: the other end closed before that."""
    while view:
        if deadline is not None:
            peer.settimeout(max(deadline - time.monotonic(), 1e-3))
        count = peer.recv_into(view)
        if not count:
            raise WireError("the other end closed")
        view = view[count:]
