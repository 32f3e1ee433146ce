"""Decodes video files in other processes, and checks what those send."""

import socket
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flexjudge_fast.media.video_limits import VideoLimits
from flexjudge_fast.media.video_sampling import FrameBudget
from flexjudge_fast.media.worker_pool import FileSource, WorkerPool
from flexjudge_fast.media.worker_wire import WireError, receive, receive_into


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


class VideoDecoder(WorkerPool):
    """Decodes untrusted videos in other processes. Safe to use from several threads, and after a fork.

    Args:
        limits: what is refused.
        num_workers: processes at most, each up to `limits.max_memory_bytes`; further threads wait.
    """

    def __init__(self, limits: VideoLimits | None = None, num_workers: int = 2) -> None:
        self.limits = limits or VideoLimits()
        super().__init__("flexjudge_fast.media.video_decode", self.limits.max_memory_bytes, num_workers)

    def decode(self, source: FileSource, budget: FrameBudget) -> DecodedVideo:
        """Decodes, samples and resizes a video file, given by path or as its bytes. Errors as of `run`."""
        limits = self.limits
        reply = _Reply(budget, limits)
        request = {"budget": asdict(budget), "limits": asdict(limits)}
        self.run(source, limits.check_file, request, reply, limits.timeout)
        assert reply.video is not None
        return reply.video


class _Reply:
    """What a worker sends for one video. It is not believed: whoever took it over may send anything."""

    def __init__(self, budget: FrameBudget, limits: VideoLimits) -> None:
        self.budget, self.limits = budget, limits
        self.frames: NDArray[np.uint8] | None = None
        self.num_starts = self.num_received = 0
        self.video: DecodedVideo | None = None
        self.error: str | None = None
        self.healthy = False

    @property
    def done(self) -> bool:
        return self.video is not None

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
