"""The process that decodes untrusted media: limits itself, then answers requests on its stdin socket in turn.

Run as `python -m flexjudge_fast.media.worker MODULE MAX_MEMORY_BYTES` by `media/worker_pool.py`. The module,
such as `flexjudge_fast.media.video_decode`, has `warm_up()`, which opens every file that decoding needs, and
`messages(file, request)`, which yields the headers and payloads of an answer.
"""

import importlib
import os
import resource
import socket
import sys
from typing import Any

from flexjudge_fast.errors import MediaError
from flexjudge_fast.media.worker_wire import WireError, receive, send


def main() -> None:
    """Serves until the other end closes, which it does when the engine's process ends."""
    peer = socket.socket(fileno=0)
    try:
        decoder = importlib.import_module(sys.argv[1])
    except ImportError as error:
        send(peer, {"error": str(error)})
        return
    decoder.warm_up()
    limit_process(int(sys.argv[2]))
    try:
        send(peer, {"ready": True})
        while True:
            request, fd = receive(peer, with_fd=True)
            if fd is None:
                return
            with os.fdopen(fd, "rb", buffering=0) as file:
                answer(peer, decoder, request, file)
    except (WireError, OSError):
        return


def answer(peer: socket.socket, decoder: Any, request: dict[str, Any], file: Any) -> None:
    """Sends the decoder's messages as they come, or an error at any point.

    `healthy` says whether this process may be used again.
    """
    limits = request["limits"]
    limit_time(limits["timeout"])
    try:
        for header, payload in decoder.messages(file, request):
            send(peer, header, payload)
        return
    except ConnectionError:
        raise  # the engine is gone
    except MediaError as error:
        reason, healthy = str(error), True
    except MemoryError:
        reason, healthy = f"it needs more than {limits['max_memory_bytes']} bytes of memory", False
    except Exception as error:  # native libraries' wrappers raise what they like on broken files
        reason, healthy = f"it cannot be decoded: {type(error).__name__}: {error}", False
    send(peer, {"error": reason[:500], "healthy": healthy})


def limit_process(max_memory_bytes: int) -> None:
    """No more files, no core dump, and no more memory than so many bytes, code and libraries included.

    Address space is what the kernel can bound: what is mapped but not touched now is allowed on top.
    """
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_FSIZE, 0)
    _limit(resource.RLIMIT_NOFILE, 4)  # stdin, stdout, stderr, and the medium
    try:
        with open("/proc/self/statm") as file:
            mapped, resident = (int(pages) * resource.getpagesize() for pages in file.read().split()[:2])
    except OSError:
        return
    _limit(resource.RLIMIT_AS, mapped + max(max_memory_bytes - resident, 0))


def limit_time(timeout: float) -> None:
    """The kernel ends this process if it is still busy some time after `timeout`, even in native code."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    spent = usage.ru_utime + usage.ru_stime
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(spent + timeout) + 2, hard))


def _limit(kind: int, most: int) -> None:
    _, hard = resource.getrlimit(kind)
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(kind, (most, most))


if __name__ == "__main__":
    main()
