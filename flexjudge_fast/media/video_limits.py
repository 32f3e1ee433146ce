"""How large a video may be, in its header's words and in fact; what is over a limit is refused."""

import math
from dataclasses import dataclass

from flexjudge_fast.errors import MediaError


@dataclass(frozen=True)
class VideoLimits:
    """Checked before decoding (headers) and again while decoding (headers lie).

    Args:
        max_file_bytes: of the video file.
        max_side, max_frame_pixels: of one decoded frame, before resizing.
        max_frames: decoded, not sampled.
        max_duration: seconds.
        max_decoded_pixels: of all decoded frames together.
        max_output_bytes: of the sampled, resized frames, 3 bytes a pixel.
        max_memory_bytes: of the process that decodes, all in all.
        patience: seconds of processor time until the headers are understood.
        timeout: seconds of wall-clock and of processor time for one video.
    """

    max_file_bytes: int = 512 << 20
    max_side: int = 8192
    max_frame_pixels: int = 4096 * 2304
    max_frames: int = 36_000
    max_duration: float = 4 * 3600.0
    max_decoded_pixels: int = 1 << 34
    max_output_bytes: int = 240 << 20
    max_memory_bytes: int = 224 << 20
    patience: float = 0.7
    timeout: float = 60.0

    def check_file(self, num_bytes: int) -> None:
        """MediaError: the file is empty or too large."""
        if num_bytes == 0:
            raise MediaError("the file is empty")
        _check("file of {} bytes", num_bytes, self.max_file_bytes)

    def check_size(self, width: int, height: int) -> None:
        """MediaError: a frame is empty or too large."""
        if width <= 0 or height <= 0:
            raise MediaError(f"a frame of {width}x{height} pixels is empty")
        if max(width, height) > self.max_side or width * height > self.max_frame_pixels:
            most = f"{self.max_side} a side, {self.max_frame_pixels} in all"
            raise MediaError(f"a frame of {width}x{height} pixels is over the limit of {most}")

    def check_length(self, num_frames: int, duration: float) -> None:
        """MediaError: too many frames, or too long."""
        _check("{} frames", num_frames, self.max_frames)
        if not math.isfinite(duration) or duration < 0:
            raise MediaError(f"its duration of {duration} s makes no sense")
        _check("duration of {:.0f} s", duration, self.max_duration)

    def check_work(self, num_frames: int, width: int, height: int) -> None:
        """MediaError: too many pixels to decode."""
        _check("{} pixels to decode", num_frames * width * height, self.max_decoded_pixels)

    def check_output(self, num_frames: int, height: int, width: int) -> None:
        """MediaError: too many bytes after sampling and resizing."""
        _check("{} bytes of resized frames", num_frames * height * width * 3, self.max_output_bytes)


def _check(what: str, value: float, most: float) -> None:
    if value > most:
        raise MediaError(f"{what.format(value)}: over the limit of {most}")
