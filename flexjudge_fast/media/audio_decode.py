"""Decodes untrusted sound with libsndfile, or FFmpeg where that cannot; runs in the worker process only."""

import io
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import Any, BinaryIO

import av
import numpy as np
import soundfile
from numpy.typing import NDArray

from flexjudge_fast.errors import MediaError
from flexjudge_fast.media.audio_limits import AudioLimits
from flexjudge_fast.media.container import Deadline, open_container, processor_time, video_streams
from flexjudge_fast.media.sample_types import to_float32

# No demuxer of this list opens a second file.
CONTAINERS = (
    *("mov", "matroska", "webm", "avi", "mpegts", "mpeg", "ogg", "flv"),
    *("mp3", "aac", "wav", "w64", "flac", "aiff", "au", "caf"),
)
CODECS = (
    *("aac", "mp3", "mp3float", "mp2", "mp2float", "opus", "libopus", "vorbis", "flac", "alac"),
    *("pcm_u8", "pcm_s16le", "pcm_s16be", "pcm_s24le", "pcm_s24be", "pcm_s32le", "pcm_s32be"),
    *("ac3", "eac3", "pcm_f32le", "pcm_f32be", "pcm_f64le", "pcm_f64be", "pcm_alaw", "pcm_mulaw"),
)
# How files begin that libsndfile is asked to read: of its many parsers only the common ones see them.
_BEGINS = (b"RIFF", b"RIFX", b"RF64", b"riff", b"fLaC", b"OggS", b"FORM", b".snd", b"caff", b"ID3")
_UNKNOWN = 1 << 62  # libsndfile's number of samples where the header tells none
_MAX_PACKET = 1 << 20  # samples of one channel that a codec may give at once
_BLOCK = 1 << 17  # samples of all channels sent at once
_TINY = b"RIFF,\0\0\0WAVEfmt \x10\0\0\0\1\0\1\0" + struct.pack("<IIHH", 8000, 16000, 2, 16)
_TINY += b"data\x08\0\0\0" + bytes(8)


@dataclass(frozen=True)
class Start:
    """What the blocks that follow are: samples per second, channels, and how the file stores samples."""

    rate: int
    channels: int
    mode: str


_Block = NDArray[np.float32]
Part = Start | _Block


def warm_up() -> None:
    """Makes the libraries import what they import late, so that no file need be opened afterwards."""
    limits = AudioLimits()
    with open("/dev/null", "rb", buffering=0) as nothing, suppress(soundfile.LibsndfileError):
        next(_with_soundfile(nothing, limits))
    for _ in _with_ffmpeg(io.BytesIO(_TINY), limits, of_video=False):
        pass


def messages(file: BinaryIO, request: dict[str, Any]) -> Iterator[tuple[dict[str, Any], bytes]]:
    """What `decode` yields, as headers and payloads for `media/worker.py`."""
    limits = AudioLimits(**request["limits"])
    for part in _promptly(decode(file, limits, request["of_video"]), limits.patience):
        if isinstance(part, Start):
            yield {"start": {"rate": part.rate, "channels": part.channels, "mode": part.mode}}, b""
            continue
        rows = max(_BLOCK // part.shape[1], 1)
        for i in range(0, len(part), rows):
            data = np.ascontiguousarray(part[i : i + rows], dtype="<f4").tobytes()
            yield {"block": len(data)}, data
    yield {"end": True}, b""


def _promptly(parts: Iterator[Part], seconds: float) -> Iterator[Part]:
    """The same parts, each within so many seconds of processor time, or this process ends."""
    while True:
        with processor_time(seconds):
            part = next(parts, None)
        if part is None:
            return
        yield part


def decode(file: BinaryIO, limits: AudioLimits, of_video: bool = False) -> Iterator[Part]:
    """A `Start`, then blocks float32 [num_samples, channels], of any length, each good until the next.

    Args:
        file: unbuffered, as libsndfile reads from its descriptor.
        of_video: it is a video, with whose first frame its sound is to begin.

    Raises:
        MediaError: broken, without sound, of a container or codec that is not read, or over a limit.
        MemoryError: it needs more memory than this process may take.
    """
    deadline = Deadline(limits.timeout)
    started, count = None, 0
    for part in _parts(file, limits, of_video):
        deadline.check()
        if isinstance(part, Start):
            limits.check_format(part.rate, part.channels)
            started = part
        elif started is not None:
            count += len(part)
            limits.check_seconds(count / started.rate)
            limits.check_values(part)
        yield part
    if not count:
        raise MediaError("it holds no samples")


def _parts(file: BinaryIO, limits: AudioLimits, of_video: bool) -> Iterator[Part]:
    file.seek(0)
    head = file.read(4)
    is_known = head.startswith(_BEGINS) or (head[:1] == b"\xff" and head[1:2] >= b"\xe0")
    if is_known and not of_video:
        started = False
        try:
            for part in _with_soundfile(file, limits):
                started = True
                yield part
            return
        except soundfile.LibsndfileError as error:
            if started:
                raise MediaError(f"it cannot be decoded: {error.error_string}") from error
    try:
        yield from _with_ffmpeg(file, limits, of_video)
    except av.FFmpegError as error:
        if isinstance(error, MemoryError):
            raise
        raise MediaError(f"it cannot be decoded: {error.strerror}") from error


def _with_soundfile(file: BinaryIO, limits: AudioLimits) -> Iterator[Part]:
    """LibsndfileError before the first part: it does not read this kind of file."""
    file.seek(0)
    with soundfile.SoundFile(file.fileno(), closefd=False) as sound:
        rate, channels = sound.samplerate, sound.channels
        limits.check_format(rate, channels)
        if sound.frames < _UNKNOWN:
            limits.check_seconds(sound.frames / rate)
        yield Start(rate, channels, f"{sound.format} {sound.subtype}")
        buffer = np.empty((max(_BLOCK // channels, 1), channels), np.float32)
        while count := sound.buffer_read_into(buffer.data, "float32"):
            yield buffer[:count]


def _with_ffmpeg(file: BinaryIO, limits: AudioLimits, of_video: bool) -> Iterator[Part]:
    with open_container(file, CONTAINERS, CODECS, {}) as container:
        if not container.streams.audio:
            hint = "; give a video with a sound track, or use_audio_in_video=False" if of_video else ""
            raise MediaError("it holds no sound" + hint)
        stream = container.streams.audio[0]
        context = stream.codec_context
        if context is None or context.name not in CODECS:
            raise MediaError("its codec is not read")
        context.thread_count = 1
        context.options = {"max_samples": str(_MAX_PACKET)}
        if stream.duration and stream.time_base:
            limits.check_seconds(float(stream.duration * stream.time_base))
        frames = container.decode(stream)
        first = next(frames, None)
        if first is None:
            return
        start = _start(first, context.name)
        limits.check_format(start.rate, start.channels)
        yield start
        delay = _delay(container, first) if of_video else 0.0
        limits.check_seconds(delay)
        yield from _shifted(_blocks(chain([first], frames), start), round(delay * start.rate), start.channels)


def _start(frame: Any, codec: str) -> Start:
    return Start(frame.sample_rate, frame.layout.nb_channels, codec)


def _delay(container: Any, frame: Any) -> float:
    """Seconds from a video's start to its first samples; 0 where the file does not tell."""
    seen = next(iter(video_streams(container)), None)
    if seen is None or seen.start_time is None or frame.time is None:
        return 0.0
    return float(frame.time - seen.start_time * seen.time_base)


def _shifted(blocks: Iterator[_Block], count: int, channels: int) -> Iterator[_Block]:
    """The same samples behind so many of silence; of a negative number, without the first ones."""
    rows = max(_BLOCK // channels, 1)
    for i in range(0, count, rows):
        yield np.zeros((min(rows, count - i), channels), np.float32)
    skipped = max(-count, 0)
    for block in blocks:
        if skipped < len(block):
            yield block[skipped:]
        skipped = max(skipped - len(block), 0)


def _blocks(frames: Iterator[Any], start: Start) -> Iterator[_Block]:
    for frame in frames:
        if _start(frame, start.mode) != start:
            raise MediaError("its rate or its channels change on the way")
        yield _block(frame, start.channels)


def _block(frame: Any, channels: int) -> _Block:
    """float32 [num_samples, channels] of FFmpeg's planar or interleaved samples."""
    array: NDArray[np.generic] = frame.to_ndarray()
    return to_float32(array.T if frame.format.is_planar else array.reshape(-1, channels))
