"""Opens untrusted containers with PyAV, of listed kinds only; runs in the worker processes only."""

import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO

import av

from flexjudge_fast.errors import MediaError


class Deadline:
    """Raises MediaError once `timeout` seconds have passed."""

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self.end = time.monotonic() + timeout

    def check(self) -> None:
        if time.monotonic() > self.end:
            raise MediaError(f"decoding takes longer than {self.timeout:g} s")


@contextmanager
def processor_time(seconds: float) -> Iterator[None]:
    """The kernel ends this process (SIGPROF) where what is inside takes more processor time than that.

    Native code that looks for something in a large file gives Python no chance to look at a clock. It is not
    wall-clock time, so a file is not refused because the machine is busy.
    """
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)


def open_container(
    file: BinaryIO, formats: Sequence[str], codecs: Sequence[str], options: dict[str, str]
) -> Any:
    """A container that `file` holds from its start; nothing else is ever opened.

    Args:
        formats, codecs: FFmpeg's names of those that are read.
        options: further ones of FFmpeg's demuxers.

    Raises:
        MediaError: it is broken or not on the list. Other errors of PyAV's pass.
    """
    limits = {
        "format_whitelist": ",".join(formats),
        "codec_whitelist": ",".join(codecs),
        "protocol_whitelist": "",
        "max_streams": "32",
    }
    file.seek(0)
    try:
        return av.open(file, options=limits | options, metadata_errors="replace", io_open=_refuse_to_open)
    except (av.InvalidDataError, ValueError) as error:
        raise MediaError(f"it is broken, or not of a kind that is read ({', '.join(formats)})") from error


def _refuse_to_open(url: str, flags: int, options: dict[str, str]) -> BinaryIO:
    raise MediaError("it refers to another file")


def video_streams(container: Any) -> list[Any]:
    """Its streams that are videos, and not the picture on a cover."""
    return [s for s in container.streams.video if "attached_pic" not in str(s.disposition)]
