"""Keeps the processes that decode media: starts them on demand, reuses them, ends those that misbehave."""

import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from flexjudge_fast.errors import EngineStateError, MediaError
from flexjudge_fast.media.worker_wire import WireError, receive, send

FileSource = str | os.PathLike[str] | bytes | bytearray | memoryview

_START_TIMEOUT = 30.0  # seconds until a new process must be ready
_GRACE = 1.0  # seconds that a process may overrun its own time-out before it is killed
_MAX_MEDIA = 200  # per process: native decoders leak
_KEPT_VARIABLES = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TMPDIR", "LANG")


class Reply(Protocol):
    """What a worker sends for one medium. It must not be believed: whoever took it over may send anything.

    `error` is the worker's own reason why it gave up, `healthy` whether it may be used after that.
    """

    error: str | None
    healthy: bool

    @property
    def done(self) -> bool:
        """Whether the last message has come."""
        ...

    def take(self, peer: socket.socket, deadline: float) -> None:
        """Reads one message. WireError: nonsense, or the end of the stream."""
        ...


class WorkerPool:
    """Runs untrusted media through other processes. Safe to use from several threads, and after a fork.

    Args:
        module: decodes in the process (`media/worker.py`).
        max_memory_bytes: of one process.
        num_workers: processes at most; further threads wait.
    """

    def __init__(self, module: str, max_memory_bytes: int, num_workers: int) -> None:
        self.module = module
        self.max_memory_bytes = max_memory_bytes
        self.num_workers = num_workers
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._slots = threading.Semaphore(self.num_workers)
        self._idle: list[DecodingProcess] = []
        self._all: set[DecodingProcess] = set()
        self._closed = False
        self._finalizer = weakref.finalize(self, _end_all, self._all, self._pid)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends all processes; a medium that another thread is waiting for fails with MediaError."""
        with self._lock:
            self._closed = True
            for worker in self._all:
                worker.kill()  # the thread that uses it, if any, closes the socket
            while self._idle:
                worker = self._idle.pop()
                worker.end()
                self._all.discard(worker)

    def run(
        self,
        source: FileSource,
        check_file: Callable[[int], None],
        request: dict[str, Any],
        reply: Reply,
        timeout: float,
    ) -> None:
        """Sends a file, given by path or as its bytes, to a process and reads its answer into `reply`.

        Args:
            check_file: raises MediaError where a file of so many bytes is not read.
            request: what `messages` of the module gets; `limits` has `timeout` and `max_memory_bytes`.
            timeout: seconds.

        Raises:
            MediaError: it cannot be read, is broken or over a limit; or decoding it crashed or hung.
            EngineStateError: this pool is closed.
        """
        self._leave_parent()
        if self._closed:
            raise EngineStateError("the decoder is closed")
        fd = _open_source(source, check_file)
        try:
            with self._slots:
                worker = self._take()
                try:
                    worker.decode(fd, request, reply, timeout)
                finally:
                    self._give_back(worker)
        finally:
            os.close(fd)

    def _leave_parent(self) -> None:
        """After a fork: processes, locks and what threads are waiting for belong to the parent."""
        if os.getpid() != self._pid:
            self._reset()

    def _take(self) -> "DecodingProcess":
        with self._lock:
            while self._idle and not self._closed:
                worker = self._idle.pop()
                if worker.is_alive():
                    return worker
                worker.end()
                self._all.discard(worker)
        worker = DecodingProcess(self.module, self.max_memory_bytes)
        with self._lock:
            if self._closed:
                worker.end()
                raise EngineStateError("the decoder is closed")
            self._all.add(worker)
        return worker

    def _give_back(self, worker: "DecodingProcess") -> None:
        with self._lock:
            if worker.healthy and worker.num_media < _MAX_MEDIA and not self._closed:
                self._idle.append(worker)
                return
            self._all.discard(worker)
        worker.end()


def _end_all(workers: "set[DecodingProcess]", pid: int) -> None:
    if os.getpid() == pid:
        for worker in workers:
            worker.end()
    workers.clear()


class DecodingProcess:
    """One worker process and the socket to it. One medium at a time."""

    def __init__(self, module: str, max_memory_bytes: int) -> None:
        self.healthy = True
        self.num_media = 0
        self.peer, theirs = socket.socketpair()
        command = [sys.executable, "-P", "-m", "flexjudge_fast.media.worker", module]
        try:
            # A session of its own: Ctrl-C in the terminal is the engine's affair.
            self.process = subprocess.Popen(
                [*command, str(max_memory_bytes)],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=_environment(),
                start_new_session=True,
            )
        except OSError as error:
            self.peer.close()
            raise MediaError(f"the process that decodes it cannot be started: {error}") from error
        finally:
            theirs.close()
        self._wait_until_ready()

    def _wait_until_ready(self) -> None:
        reason = "it ends at once"
        try:
            header, _ = receive(self.peer, deadline=time.monotonic() + _START_TIMEOUT)
            if header == {"ready": True}:
                return
            reason = str(header.get("error"))
        except TimeoutError:
            reason = f"it is not ready after {_START_TIMEOUT:g} s"
        except (OSError, WireError):
            pass
        except BaseException:
            self.end()
            raise
        self.end()
        raise MediaError(f"the process that decodes it does not start: {reason}")

    def is_alive(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> None:
        """Kills the process and reaps it. May be called from any thread, more than once."""
        self.healthy = False
        self.process.kill()
        self.process.wait()

    def end(self) -> None:
        """As `kill`, and closes the socket: no other thread may be using it."""
        self.kill()
        self.peer.close()

    def decode(self, fd: int, request: dict[str, Any], reply: Reply, timeout: float) -> None:
        """As `WorkerPool.run`; after an error that leaves the process in doubt, `healthy` is False."""
        self.healthy = False
        self.num_media += 1
        deadline = time.monotonic() + timeout + _GRACE
        try:
            self.peer.settimeout(timeout)
            send(self.peer, request, fd=fd)
            while not reply.done and reply.error is None:
                reply.take(self.peer, deadline)
        except TimeoutError as error:
            raise MediaError(f"decoding takes longer than {timeout:g} s") from error
        except (OSError, WireError) as error:
            raise MediaError(f"the process that decodes it {self._fate()}") from error
        if reply.error is not None:
            self.healthy = reply.healthy
            raise MediaError(reply.error)
        self.healthy = True

    def _fate(self) -> str:
        """What became of a process that broke the connection or the protocol."""
        try:
            code = self.process.wait(timeout=_GRACE)
        except subprocess.TimeoutExpired:
            return "sent nonsense"
        if code == -signal.SIGPROF:  # `container.processor_time`
            return "found nothing more in it for too long"
        if code >= 0:
            return f"ended with code {code}"
        return f"crashed ({signal.Signals(-code).name})"


def _environment() -> dict[str, str]:
    """Finds the same modules as this process; knows none of its secrets."""
    root = str(Path(__file__).parents[2])
    paths = [path for path in sys.path if path]
    kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    single = {"OPENBLAS_NUM_THREADS": "1"}  # each thread of numpy's would map memory
    return {**kept, **single, "PYTHONPATH": os.pathsep.join([*paths, *([] if root in paths else [root])])}


def _open_source(source: FileSource, check_file: Callable[[int], None]) -> int:
    """An open file descriptor that the caller closes. MediaError: no regular file, empty or too large."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        check_file(memoryview(source).nbytes)
        return _anonymous_file(memoryview(source).cast("B"))
    try:
        fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe must not make us wait
    except (OSError, ValueError) as error:
        raise MediaError(f"it cannot be opened: {getattr(error, 'strerror', None) or error}") from error
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise MediaError("it is not a regular file")
        check_file(status.st_size)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _anonymous_file(data: memoryview) -> int:
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("medium")
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    try:
        while data:
            data = data[os.write(fd, data) :]
    except BaseException:
        os.close(fd)
        raise
    return fd
