"""Small videos, made with PyAV, and what a plain decoding of them gives."""

import io
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

# name: container, encoder, pixel format, options
FORMATS: dict[str, tuple[str, str, str, dict[str, str]]] = {
    "mp4-h264": ("mp4", "libx264", "yuv420p", {}),
    "mp4-mpeg4": ("mp4", "mpeg4", "yuv420p", {}),
    "mkv-hevc": ("matroska", "libx265", "yuv420p", {"x265-params": "log-level=none"}),
    "mkv-h264-444": ("matroska", "libx264", "yuv444p", {}),
    "webm-vp8": ("webm", "libvpx", "yuv420p", {}),
    "webm-vp9": ("webm", "libvpx-vp9", "yuv420p", {}),
    "avi-mpeg4": ("avi", "mpeg4", "yuv420p", {}),
    "avi-mjpeg": ("avi", "mjpeg", "yuvj420p", {}),
    "ts-mpeg2": ("mpegts", "mpeg2video", "yuv420p", {}),
    "flv-flv1": ("flv", "flv", "yuv420p", {}),
    "gif": ("gif", "gif", "rgb8", {}),
}


def make_video(
    name: str = "mp4-h264",
    num_frames: int = 9,
    size: tuple[int, int] = (64, 48),
    fps: Fraction | int = 25,
    times: Sequence[int] | None = None,
    rotation: int = 0,
    options: dict[str, str] | None = None,
) -> bytes:
    """A video of `size` (width, height) whose frames all differ; `times` in milliseconds, if not regular."""
    container, codec, pixels, usual = FORMATS[name]
    width, height = size
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        stream: Any = output.add_stream(codec, rate=fps, options=usual if options is None else options)
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if rotation:
            stream.set_display_rotation(rotation)
        for i in range(num_frames):
            frame = av.VideoFrame.from_ndarray(picture(i, width, height), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[i], Fraction(1, 1000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return file.getvalue()


def picture(i: int, width: int, height: int) -> NDArray[np.uint8]:
    """uint8 [height, width, 3]: ramps, and a square that moves."""
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0] = np.linspace(0, 255, width)
    image[..., 1] = np.linspace(0, 255, height)[:, None]
    left, top = 5 * i % max(width - 8, 1), 3 * i % max(height - 8, 1)
    image[top : top + 8, left : left + 8] = (0, 0, 255)
    return image


def plain_frames(data: bytes) -> tuple[list[NDArray[np.uint8]], list[float]]:
    """Every frame as RGB, and its time; nothing of ours is in the way."""
    with av.open(io.BytesIO(data)) as container:
        frames = list(container.decode(video=0))
        return [frame.to_ndarray(format="rgb24") for frame in frames], [float(f.time or 0) for f in frames]
