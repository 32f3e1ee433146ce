"""How large and how loud sound may be, in its header's words and in fact; what is over a limit is refused."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flexjudge_fast.errors import MediaError

_LEAST_RATE, _MOST_RATE = 1000, 768_000  # Hz
_LOUDEST = 16.0  # +24 dB; more is no sound in -1..1, as with the values of 16-bit integers in a float array


@dataclass(frozen=True)
class AudioLimits:
    """Checked before decoding (headers) and again while decoding (headers lie).

    Args:
        max_file_bytes: of the sound file.
        max_video_bytes: of a video file whose sound track is read.
        max_seconds: of the sound.
        max_channels: of the sound.
        max_memory_bytes: of the process that decodes, all in all.
        patience: seconds of processor time until the first samples, and from some samples to the next.
        timeout: seconds of wall-clock and of processor time for one sound.
    """

    max_file_bytes: int = 64 << 20
    max_video_bytes: int = 512 << 20
    max_seconds: float = 300.0
    max_channels: int = 8
    max_memory_bytes: int = 224 << 20
    patience: float = 0.7
    timeout: float = 30.0

    def check_file(self, num_bytes: int) -> None:
        """MediaError: the file is empty or too large."""
        if num_bytes == 0:
            raise MediaError("the file is empty")
        if num_bytes > self.max_file_bytes:
            raise MediaError(f"file of {num_bytes} bytes: over the limit of {self.max_file_bytes}")

    def check_format(self, rate: float, channels: int) -> None:
        """MediaError: a rate or a number of channels that is not read."""
        if not _LEAST_RATE <= rate <= _MOST_RATE or rate != math.floor(rate):
            raise MediaError(f"a rate of {rate}; whole numbers from {_LEAST_RATE} to {_MOST_RATE} are read")
        if not 1 <= channels <= self.max_channels:
            raise MediaError(f"{channels} channels; 1 to {self.max_channels} are read")

    def check_seconds(self, seconds: float) -> None:
        """MediaError: too long, by header or so far."""
        if not seconds <= self.max_seconds:
            raise MediaError(f"{seconds:.1f} s or more: longer than the {self.max_seconds:g} s allowed")

    def check_values(self, block: NDArray[np.float32]) -> None:
        """MediaError: NaN, infinite, or far beyond -1..1."""
        if block.size:
            peak = max(-float(block.min()), float(block.max()))  # NaN if there is one
            if not peak <= _LOUDEST:
                raise MediaError(f"a sample of {peak:g}; give finite values in -1..1")
