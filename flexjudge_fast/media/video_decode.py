"""Decodes an untrusted video with PyAV, frame after frame; runs in the worker process only.

A first pass reads the packets without decoding them, which tells how many frames there are and when. The
second decodes and keeps the sampled ones. Where the packets were wrong (hidden frames, fields, lies) the
decoded frames are the truth, and a third pass samples among those.
"""

from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass
from errno import EINVAL
from fractions import Fraction
from io import BytesIO
from typing import Any, BinaryIO

import av
from av.video.reformatter import VideoReformatter
from PIL import Image

from flexjudge_fast.errors import MediaError
from flexjudge_fast.media.container import Deadline, open_container, processor_time, video_streams
from flexjudge_fast.media.video_limits import VideoLimits
from flexjudge_fast.media.video_sampling import (
    FrameBudget,
    average_fps,
    frame_indices,
    frames_digest,
    sampled_fps,
)

# No demuxer of this list opens a second file; playlists (hls, dash, concat, image sequences) are not on it.
CONTAINERS = ("mov", "matroska", "webm", "avi", "mpegts", "mpeg", "ogg", "flv", "gif")
CODECS: tuple[str, ...] = (
    *("h264", "hevc", "vp8", "vp9", "libdav1d", "av1", "mpeg1video", "mpeg2video", "mpeg4", "h263", "flv"),
    *("msmpeg4v2", "msmpeg4", "theora", "mjpeg", "prores", "gif"),
)
_TINY = bytes.fromhex("47494638396101000100800000000000ffffff2c00000000010001000002024401003b")  # a GIF


@dataclass(frozen=True)
class Survey:
    """What a pass over the packets, or over the frames, found.

    Args:
        total: frames; as far as packets tell.
        duration: seconds from the first frame's start to the last one's end; 0 without time stamps.
        stated: frames per second by the header, if any.
    """

    total: int
    duration: float
    stated: float | None


@dataclass(frozen=True)
class Start:
    """Sampled frames follow: `num_frames` of `size` (height, width). A second one takes back the first."""

    num_frames: int
    size: tuple[int, int]


@dataclass(frozen=True)
class Summary:
    """What the frames that followed the last `Start` are.

    Args:
        digest: 32 bytes over mode, size and pixels of the sampled frames before resizing.
        size: (width, height) of a frame before resizing, as it is shown.
        mode: pixel format in the file, such as "yuv420p".
        indices: which of the real frames were taken.
        times: seconds from the first frame, one for each index.
        fps: average of the whole video.
        sample_fps: of the frames taken.
    """

    digest: bytes
    size: tuple[int, int]
    mode: str
    indices: tuple[int, ...]
    times: tuple[float, ...]
    fps: float
    sample_fps: float


Part = Start | bytes | Summary


def warm_up() -> None:
    """Imports what PyAV and Pillow import late, so that no file need be opened afterwards."""
    from av.subtitles import codeccontext  # noqa: F401

    for _ in decode(BytesIO(_TINY), FrameBudget(), VideoLimits()):
        pass


def messages(file: BinaryIO, request: dict[str, Any]) -> Iterator[tuple[dict[str, Any], bytes]]:
    """What `decode` yields, as headers and payloads for `media/worker.py`."""
    budget, limits = FrameBudget(**request["budget"]), VideoLimits(**request["limits"])
    for part in decode(file, budget, limits):
        if isinstance(part, bytes):
            yield {"frame": len(part)}, part
        elif isinstance(part, Start):
            yield {"start": asdict(part)}, b""
        else:
            yield {"end": asdict(part) | {"digest": part.digest.hex()}}, b""


def decode(file: BinaryIO, budget: FrameBudget, limits: VideoLimits) -> Iterator[Part]:
    """A `Start`, uint8 [height, width, 3] RGB for each sampled frame, and a `Summary`.

    Raises:
        MediaError: broken, without frames, of a container or codec that is not read, or over a limit.
        MemoryError: it needs more memory than this process may take.
    """
    deadline = Deadline(limits.timeout)
    try:
        survey = survey_packets(file, limits, deadline)
        for _ in range(2):
            found = yield from Sampler(survey, budget, limits, deadline).run(file)
            if found.total == survey.total:
                return
            survey = found
    except av.FFmpegError as error:
        if isinstance(error, MemoryError):
            raise
        reason = f"it cannot be decoded: {error.strerror}"
        if error.errno == EINVAL:  # what FFmpeg answers where a frame has more than `max_pixels`
            reason = f"it is broken, or its frames are over the limit of {limits.max_frame_pixels} pixels"
        raise MediaError(reason) from error
    raise MediaError("its frames differ from one decoding to the next")


def open_video(file: BinaryIO, limits: VideoLimits) -> tuple[Any, Any]:
    """The container and its video stream, headers within limits; nothing but `file` is ever opened."""
    options = {"max_pixels": str(limits.max_frame_pixels), "threads": "1"}
    container = open_container(file, CONTAINERS, CODECS, options)
    streams = video_streams(container)
    if not streams:
        raise MediaError("it holds no video")
    stream = streams[0]
    if stream.codec_context is None or stream.codec_context.name not in CODECS:
        raise MediaError("its codec is not read")
    stream.codec_context.thread_count = 1
    stream.codec_context.options = {"max_pixels": str(limits.max_frame_pixels)}
    if stream.codec_context.width or stream.codec_context.height:
        limits.check_size(stream.codec_context.width, stream.codec_context.height)
    limits.check_length(stream.frames, (container.duration or 0) / av.time_base)
    return container, stream


def survey_packets(file: BinaryIO, limits: VideoLimits, deadline: Deadline) -> Survey:
    """Counts packets and reads their time stamps; decodes nothing but what the container's header needs."""
    with processor_time(limits.patience):
        container, stream = open_video(file, limits)
    with container:
        total, first, last, end = 0, None, None, 0
        for packet in container.demux(stream):
            deadline.check()
            if not packet.size or packet.is_discard:
                continue
            total += 1
            limits.check_length(total, 0.0)
            pts = packet.dts if packet.pts is None else packet.pts
            if pts is not None:
                first = pts if first is None else min(first, pts)
                if last is None or pts > last:
                    last, end = pts, packet.duration or 0
        if not total:
            raise MediaError("it holds no frames")
        duration = _duration(total, first, last, end, stream.time_base)
        limits.check_length(total, duration)
        limits.check_work(total, stream.codec_context.width, stream.codec_context.height)
        rate = stream.average_rate
        return Survey(total, duration, float(rate) if rate else None)


def _duration(total: int, first: int | None, last: int | None, end: int, time_base: Fraction | None) -> float:
    """Seconds; a last frame that does not say how long it is shown lasts as long as the others do."""
    if first is None or last is None or time_base is None:
        return 0.0
    span = last - first
    if end <= 0 and total > 1:
        return float(Fraction(span * total, total - 1) * time_base)
    return float((span + end) * time_base)


class Sampler:
    """One decoding of the whole video."""

    def __init__(self, survey: Survey, budget: FrameBudget, limits: VideoLimits, deadline: Deadline) -> None:
        fps = average_fps(survey.total, survey.duration, survey.stated)
        if fps is None and survey.total > 1:
            raise MediaError("it has neither time stamps nor a frame rate")
        self.fps = fps or 1.0
        self.total, self.stated = survey.total, survey.stated
        self.budget, self.limits, self.deadline = budget, limits, deadline
        count = budget.num_frames(survey.total, self.fps)
        self.indices = frame_indices(survey.total, count)
        self.times: list[float] = []
        self.reformatter = VideoReformatter()

    def run(self, file: BinaryIO) -> Generator[Part, None, Survey]:
        """Yields what `decode` does; returns what frames there really are."""
        container, stream = open_video(file, self.limits)
        with container:
            wanted = set(self.indices)
            total, begin, end, seen, digest, target = 0, 0.0, None, None, frames_digest(0, 0), (0, 0)
            for frame in container.decode(stream):
                self._check(frame, total, seen)
                if total == 0:
                    begin = frame.time or 0.0
                    seen = (frame.width, frame.height, frame.format.name, frame_turns(frame))
                    size = seen[:2] if seen[3] % 2 == 0 else seen[1::-1]
                    target = self._target(size)
                    digest = frames_digest(*size)
                    yield Start(len(self.indices), target)
                if total in wanted:
                    image = self._image(frame)
                    digest.update(image.tobytes())
                    self.times.append(total / self.fps if frame.time is None else frame.time - begin)
                    yield image.resize(target[::-1], Image.Resampling.BICUBIC).tobytes()
                    del image
                total, end = total + 1, frame.time
        if seen is None:
            raise MediaError("none of its frames can be decoded")
        if total == self.total:
            yield self._summary(digest.digest(), size, seen[2])
        duration = 0.0 if end is None or total < 2 else (end - begin) * total / (total - 1)
        return Survey(total, max(duration, 0.0), self.stated)

    def _check(self, frame: Any, total: int, seen: tuple[int, int, str, int] | None) -> None:
        self.deadline.check()
        self.limits.check_size(frame.width, frame.height)
        self.limits.check_length(total + 1, 0.0)
        self.limits.check_work(total + 1, frame.width, frame.height)
        if seen is not None and (frame.width, frame.height) != seen[:2]:
            raise MediaError(f"frame {total} is {frame.width}x{frame.height}, the first {seen[0]}x{seen[1]}")

    def _target(self, size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) after resizing a frame of (width, height)."""
        target = self.budget.frame_size(size[1], size[0], len(self.indices))
        self.limits.check_output(len(self.indices), *target)
        return target

    def _image(self, frame: Any) -> Image.Image:
        """The frame in RGB, turned as the file says it is to be shown."""
        single = {"threads": 1} if int(av.__version__.split(".")[0]) >= 17 else {}  # earlier ones have none
        plane: Any = self.reformatter.reformat(frame, format="rgb24", **single).planes[0]
        size = (frame.width, frame.height)
        image = Image.frombuffer("RGB", size, plane, "raw", "RGB", plane.line_size, 1)
        turns = frame_turns(frame)
        return image.transpose(_TURNS[turns - 1]) if turns else image

    def _summary(self, digest: bytes, size: tuple[int, int], mode: str) -> Summary:
        rate = sampled_fps(self.total, len(self.indices), self.fps)
        return Summary(digest, size, mode, tuple(self.indices), tuple(self.times), self.fps, rate)


_TURNS = (Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)


def frame_turns(frame: Any) -> int:
    """Quarter turns counter-clockwise that show the frame upright; other angles and mirroring are ignored."""
    return round(getattr(frame, "rotation", 0) / 90) % 4
