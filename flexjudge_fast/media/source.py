"""The bytes of a medium, from a path, bytes, a data URL or a remote URL, none longer than allowed."""

import base64
import os
import stat
import time
import urllib.error
import urllib.request
from urllib.parse import urlsplit

from flexjudge_fast.errors import MediaError

_SHOWN = 120  # characters of a path or URL in an error
_TIMEOUT, _DEADLINE = 10.0, 30.0  # seconds without a byte, and for the whole download
_CHUNK = 1 << 16  # bytes


def describe(source: object) -> str:
    """A source in a few words, for errors; never its content."""
    if isinstance(source, str) and source[:5].lower() == "data:":
        return "data URL"
    if isinstance(source, str) and is_remote(source):
        try:
            parts = urlsplit(source)
        except ValueError:
            return "malformed URL"
        return f"{parts.scheme}://{parts.hostname}{parts.path}"[:_SHOWN]  # passwords and tokens left out
    if isinstance(source, str | os.PathLike):
        path = repr(os.fspath(source))
        return path if len(path) <= _SHOWN else f"{path[:_SHOWN]}..."
    if isinstance(source, bytes | bytearray | memoryview):
        return f"{memoryview(source).nbytes} bytes"
    return type(source).__name__


def is_remote(source: str) -> bool:
    return source[:8].lower().startswith(("http://", "https://"))


def read_source(source: object, max_bytes: int, allow_remote: bool) -> bytes:
    """All bytes of a source.

    Args:
        source: path, bytes, `data:` URL in base64, or http(s) URL. `file:` URLs are not read: give the path.
        allow_remote: whether http(s) may be fetched. Whoever allows it lets the caller reach every host that
            this machine reaches.

    Raises:
        MediaError: with the reason only; the caller says which medium. OSError and ValueError of a path that
        cannot be opened pass.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        _check_length(memoryview(source).nbytes, max_bytes)
        return _checked(bytes(source), max_bytes)
    if isinstance(source, str):
        if source[:5].lower() == "data:":
            return _read_data_url(source, max_bytes)
        if source[:5].lower() == "file:":
            raise MediaError("file: URLs are not read; give the path itself")
        if is_remote(source):
            if not allow_remote:
                raise MediaError("remote URLs are fetched with allow_remote=True only")
            return _fetch(source, max_bytes)
    if isinstance(source, str | os.PathLike):
        return _read_file(source, max_bytes)
    raise MediaError(f"{type(source).__name__} is not a path, bytes or URL")


def _check_length(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise MediaError(f"{size:,} bytes are more than the {max_bytes:,} allowed")


def _checked(data: bytes, max_bytes: int) -> bytes:
    _check_length(len(data), max_bytes)
    if not data:
        raise MediaError("it is empty")
    return data


def _open_now(path: str, flags: int) -> int:
    """A named pipe would otherwise wait for its writer."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _read_file(path: str | os.PathLike[str], max_bytes: int) -> bytes:
    with open(path, "rb", opener=_open_now) as file:
        info = os.fstat(file.fileno())
        if not stat.S_ISREG(info.st_mode):
            raise MediaError("it is not a regular file")
        _check_length(info.st_size, max_bytes)
        data = file.read(info.st_size + 1)  # it may have grown
    return _checked(data, max_bytes)


def _read_data_url(url: str, max_bytes: int) -> bytes:
    header, comma, text = url.partition(",")
    if not comma or not header.endswith(";base64"):
        raise MediaError("a data URL must be data:TYPE;base64,DATA")
    _check_length(len(text) * 3 // 4 - 2, max_bytes)  # before it is decoded; up to two bytes are padding
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise MediaError(f"its base64 is broken: {error}") from None
    return _checked(data, max_bytes)


def _fetch(url: str, max_bytes: int) -> bytes:
    """By http(s) only, through redirects too."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    request = urllib.request.Request(url, headers={"User-Agent": "flexjudge_fast"})
    end = time.monotonic() + _DEADLINE
    data = bytearray()
    try:
        with opener.open(request, timeout=_TIMEOUT) as answer:
            while chunk := answer.read1(_CHUNK):
                data += chunk
                _check_length(len(data), max_bytes)
                if time.monotonic() > end:
                    raise MediaError(f"it was not there after {_DEADLINE:.0f} seconds")
    except MediaError:
        raise
    except Exception as error:  # urllib, http.client, ssl and socket each have their own
        raise MediaError(f"it could not be fetched: {type(error).__name__}: {error}") from error
    return _checked(bytes(data), max_bytes)
