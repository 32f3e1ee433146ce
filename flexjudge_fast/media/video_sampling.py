"""Which frames of a video Qwen2.5-VL looks at, and how large each becomes: arithmetic only."""

import math
import struct
from dataclasses import dataclass, replace
from hashlib import blake2b

from flexjudge_fast.errors import InvalidArgumentError
from flexjudge_fast.media.items import MediaOptions
from flexjudge_fast.media.smart_resize import smart_resize


@dataclass(frozen=True)
class FrameBudget:
    """How many frames and pixels of a video the model takes.

    Args:
        factor: pixels per side of a merged patch; height and width become multiples of it.
        temporal: frames per temporal patch; the number of sampled frames is a multiple of it.
        min_pixels, max_pixels: pixels of one frame after resizing.
        total_pixels: pixels of all temporal patches together.
        min_frames, max_frames: frames taken of one video.
        fps: frames per second taken.
        resize: (width, height) that stand in for the frame's own before they are rounded.
    """

    factor: int = 28
    temporal: int = 2
    min_pixels: int = 128 * 28 * 28
    max_pixels: int = 768 * 28 * 28
    total_pixels: int = int(24576 * 28 * 28 * 0.9)
    min_frames: int = 4
    max_frames: int = 768
    fps: float = 2.0
    resize: tuple[int, int] | None = None

    def with_options(self, options: MediaOptions) -> "FrameBudget":
        """This budget as one judgement's options change it. InvalidArgumentError: no pixels or no frames."""
        for name, value in (("fps", options.fps), ("max_pixels", options.max_pixels)):
            if value is not None and not 0 < value < math.inf:
                raise InvalidArgumentError(f"{name}={value}: give a number above 0")
        if options.resize is not None and min(options.resize) < 1:
            raise InvalidArgumentError(
                f"resize={options.resize}: give a width and a height of at least 1 pixel"
            )
        most = self.max_pixels if options.max_pixels is None else options.max_pixels
        return replace(
            self,
            max_pixels=most,
            min_pixels=min(self.min_pixels, most),
            fps=self.fps if options.fps is None else options.fps,
            resize=self.resize if options.resize is None else options.resize,
        )

    def num_frames(self, total: int, video_fps: float) -> int:
        """How many of `total` frames are taken: a multiple of `temporal`, or 1 of a video of one frame."""
        if total < self.temporal:
            return total
        least = -(-self.min_frames // self.temporal) * self.temporal
        most = min(self.max_frames, total) // self.temporal * self.temporal
        wanted = min(max(total / video_fps * self.fps, least), most, total)
        return max(int(wanted) // self.temporal * self.temporal, self.temporal)

    def frame_size(self, height: int, width: int, num_frames: int) -> tuple[int, int]:
        """(height, width) of each of `num_frames` frames after resizing. MediaError: no such size exists."""
        if self.resize is not None:  # limits of an image, as in qwen_vl_utils
            width, height = self.resize
            return smart_resize(height, width, self.factor, 4 * self.factor**2, 16384 * self.factor**2)
        share = min(self.max_pixels, self.total_pixels / num_frames * self.temporal)
        most = min(max(share, int(self.min_pixels * 1.05)), self.max_pixels)
        return smart_resize(height, width, self.factor, self.min_pixels, int(most))


def frame_indices(total: int, num_frames: int) -> list[int]:
    """`torch.linspace(0, total - 1, num_frames).round()` to the last bit, without torch.

    In float64 some halves would round the other way, so each step rounds to float32 as torch's do.
    """
    if num_frames == 1:
        return [0]
    last = total - 1
    step = _float32(last / (num_frames - 1))
    low = [round(_float32(step * i)) for i in range(num_frames // 2)]
    high = [round(_float32(last - step * i)) for i in range(num_frames - len(low))]
    return low + high[::-1]


def sampled_fps(total: int, num_frames: int, video_fps: float) -> float:
    """Frames per second that are left when `num_frames` of `total` are taken."""
    return num_frames / total * video_fps


def average_fps(total: int, duration: float, stated: float | None) -> float | None:
    """Frames per second over the whole video; None where neither clock nor header knows.

    The header's rate stands where it agrees with the time stamps to less than one frame, since they are often
    rounded to a millisecond and 29.998 for 30 would change the number of frames taken. Elsewhere, as in a
    video of variable rate or with a lying header, it is frames / duration.

    Args:
        duration: seconds from the first frame's start to the last frame's end; 0 where unknown.
    """
    if stated is not None and not (0 < stated <= 1000):
        stated = None
    if duration <= 0:
        return stated
    if stated is not None and abs(total - duration * stated) < 1:
        return stated
    return total / duration


def frames_digest(width: int, height: int) -> blake2b:
    """A 32-byte digest to be updated with the bytes of each sampled RGB frame of that size."""
    return blake2b(b"RGB %d %d;" % (width, height), digest_size=32)


def _float32(x: float) -> float:
    return float(struct.unpack("f", struct.pack("f", x))[0])
