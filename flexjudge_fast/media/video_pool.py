"""Keeps the processes that decode videos: starts them on demand, reuses them, ends those that misbehave."""

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
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flexjudge_fast.errors import EngineStateError, MediaError
from flexjudge_fast.media.video_limits import VideoLimits
from flexjudge_fast.media.video_sampling import FrameBudget
from flexjudge_fast.media.video_wire import WireError, receive, receive_into, send

VideoSource = str | os.PathLike[str] | bytes | bytearray | memoryview

_START_TIMEOUT = 30.0  # seconds until a new process must be ready
_GRACE = 1.0  # seconds that a process may overrun its own time-out before it is killed
_MAX_VIDEOS = 200  # per process: native decoders leak
_KEPT_VARIABLES = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TMPDIR", "LANG")


@dataclass(frozen=True, eq=False)
class DecodedVideo:
    """A video's sampled frames, resized.

    Args:
        frames: uint8 [num_frames, height, width, 3], RGB.
        digest: 32 bytes over mode, size and pixels of the sampled frames before resizing.
        size: (width, height) of a frame before resizing, as it is shown.
        mode: pixel format of the source, such as "yuv420p"; "RGB" for frames given one by one.
        indices: which of the source's frames were taken.
        times: seconds from the first frame, one for each index.
        fps: average frames per second of the source.
        sample_fps: frames per second of those taken.
        seconds_per_grid: seconds from one temporal patch to the next.
    """

    frames: NDArray[np.uint8]
    digest: bytes
    size: tuple[int, int]
    mode: str
    indices: tuple[int, ...]
    times: tuple[float, ...]
    fps: float
    sample_fps: float
    seconds_per_grid: float


class VideoDecoder:
    """Decodes untrusted videos in other processes. Safe to use from several threads, and after a fork.

    Args:
        limits: what is refused.
        num_workers: processes at most, each up to `limits.max_memory_bytes`; further threads wait.
    """

    def __init__(self, limits: VideoLimits | None = None, num_workers: int = 2) -> None:
        self.limits = limits or VideoLimits()
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

    def __enter__(self) -> "VideoDecoder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends all processes; a video that another thread is waiting for fails with MediaError."""
        with self._lock:
            self._closed = True
            for worker in self._all:
                worker.kill()  # the thread that uses it, if any, closes the socket
            while self._idle:
                worker = self._idle.pop()
                worker.end()
                self._all.discard(worker)

    def decode(self, source: VideoSource, budget: FrameBudget) -> DecodedVideo:
        """Decodes, samples and resizes a video file, given by path or as its bytes.

        Raises:
            MediaError: it cannot be read, is broken or over a limit; or decoding it crashed or hung.
            EngineStateError: this decoder is closed.
        """
        if os.getpid() != self._pid:
            self._reset()  # the processes belong to the parent
        if self._closed:
            raise EngineStateError("the video decoder is closed")
        fd = _open_source(source, self.limits)
        try:
            with self._slots:
                worker = self._take()
                try:
                    return worker.decode(fd, budget, self.limits)
                finally:
                    self._give_back(worker)
        finally:
            os.close(fd)

    def _take(self) -> "DecodingProcess":
        with self._lock:
            while self._idle and not self._closed:
                worker = self._idle.pop()
                if worker.is_alive():
                    return worker
                worker.end()
                self._all.discard(worker)
        worker = DecodingProcess(self.limits)
        with self._lock:
            if self._closed:
                worker.end()
                raise EngineStateError("the video decoder is closed")
            self._all.add(worker)
        return worker

    def _give_back(self, worker: "DecodingProcess") -> None:
        with self._lock:
            if worker.healthy and worker.num_videos < _MAX_VIDEOS and not self._closed:
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
    """One worker process and the socket to it. One video at a time."""

    def __init__(self, limits: VideoLimits) -> None:
        self.healthy = True
        self.num_videos = 0
        self.peer, theirs = socket.socketpair()
        command = [sys.executable, "-P", "-m", "flexjudge_fast.media.video_worker"]
        try:
            # A session of its own: Ctrl-C in the terminal is the engine's affair.
            self.process = subprocess.Popen(
                [*command, str(limits.max_memory_bytes)],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=_environment(),
                start_new_session=True,
            )
        except OSError as error:
            self.peer.close()
            raise MediaError(f"the process that decodes videos cannot be started: {error}") from error
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
        raise MediaError(f"the process that decodes videos does not start: {reason}")

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

    def decode(self, fd: int, budget: FrameBudget, limits: VideoLimits) -> DecodedVideo:
        """As `VideoDecoder.decode`; after an error that leaves the process in doubt, `healthy` is False."""
        self.healthy = False
        self.num_videos += 1
        deadline = time.monotonic() + limits.timeout + _GRACE
        try:
            self.peer.settimeout(limits.timeout)
            send(self.peer, {"budget": asdict(budget), "limits": asdict(limits)}, fd=fd)
            reply = _Reply(budget, limits)
            while reply.video is None and reply.error is None:
                reply.take(self.peer, deadline)
        except TimeoutError as error:
            raise MediaError(f"decoding takes longer than {limits.timeout:g} s") from error
        except (OSError, WireError) as error:
            raise MediaError(f"the process that decodes it {self._fate()}") from error
        if reply.error is not None:
            self.healthy = reply.healthy
            raise MediaError(reply.error)
        self.healthy = True
        assert reply.video is not None
        return reply.video

    def _fate(self) -> str:
        """What became of a process that broke the connection or the protocol."""
        try:
            code = self.process.wait(timeout=_GRACE)
        except subprocess.TimeoutExpired:
            return "sent nonsense"
        if code >= 0:
            return f"ended with code {code}"
        return f"crashed ({signal.Signals(-code).name})"


class _Reply:
    """What a worker sends for one video. It is not believed: whoever took it over may send anything."""

    def __init__(self, budget: FrameBudget, limits: VideoLimits) -> None:
        self.budget, self.limits = budget, limits
        self.frames: NDArray[np.uint8] | None = None
        self.num_starts = self.num_received = 0
        self.video: DecodedVideo | None = None
        self.error: str | None = None
        self.healthy = False

    def take(self, peer: socket.socket, deadline: float) -> None:
        """Reads one message. WireError: nonsense, or the end of the stream."""
        header, _ = receive(peer, deadline=deadline)
        match header:
            case {"start": {"num_frames": int(count), "size": [int(height), int(width)]}}:
                self._start(count, height, width)
            case {"frame": int(size)}:
                frames = self.frames
                if frames is None or self.num_received == len(frames) or size != frames[0].nbytes:
                    raise WireError("a frame that was not announced")
                receive_into(peer, memoryview(frames[self.num_received]).cast("B"), deadline)
                self.num_received += 1
            case {"end": summary}:
                self.video = self._end(summary)
            case {"error": str(error), "healthy": bool(healthy)}:
                self.error, self.healthy = error, healthy
            case _:
                raise WireError("a message that is none")

    def _start(self, count: int, height: int, width: int) -> None:
        sane = 0 < count <= self.budget.max_frames and height > 0 and width > 0
        if not sane or self.num_starts == 2 or count * height * width * 3 > self.limits.max_output_bytes:
            raise WireError("frames over the limits")
        self.num_starts += 1
        self.num_received = 0
        self.frames = np.empty((count, height, width, 3), np.uint8)

    def _end(self, summary: Any) -> DecodedVideo:
        if self.frames is None or self.num_received != len(self.frames):
            raise WireError("an end before the last frame")
        try:
            width, height = map(int, summary["size"])
            video = DecodedVideo(
                self.frames,
                digest=bytes.fromhex(summary["digest"]),
                size=(width, height),
                mode=str(summary["mode"]),
                indices=tuple(map(int, summary["indices"])),
                times=tuple(map(float, summary["times"])),
                fps=float(summary["fps"]),
                sample_fps=float(summary["sample_fps"]),
                seconds_per_grid=self.budget.temporal / float(summary["sample_fps"]),
            )
        except (KeyError, TypeError, ValueError, ArithmeticError) as error:
            raise WireError("a summary that is none") from error
        if {len(video.indices), len(video.times)} != {len(self.frames)} or len(video.digest) != 32:
            raise WireError("a summary that does not fit its frames")
        return video


def _environment() -> dict[str, str]:
    """Finds the same modules as this process; knows none of its secrets."""
    root = str(Path(__file__).parents[2])
    paths = [path for path in sys.path if path]
    kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    return {**kept, "PYTHONPATH": os.pathsep.join([*paths, *([] if root in paths else [root])])}


def _open_source(source: VideoSource, limits: VideoLimits) -> int:
    """An open file descriptor that the caller closes. MediaError: no regular file, empty or too large."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        limits.check_file(memoryview(source).nbytes)
        return _anonymous_file(memoryview(source).cast("B"))
    try:
        fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe must not make us wait
    except (OSError, ValueError) as error:
        raise MediaError(f"it cannot be opened: {getattr(error, 'strerror', None) or error}") from error
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise MediaError("it is not a regular file")
        limits.check_file(status.st_size)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _anonymous_file(data: memoryview) -> int:
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("video")
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
