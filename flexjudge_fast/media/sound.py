"""Blocks of samples become one sound: mixed to mono, resampled, and digested as they were."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from flexjudge_fast.errors import MediaError
from flexjudge_fast.media.audio_limits import AudioLimits
from flexjudge_fast.media.keys import SampleDigest

if TYPE_CHECKING:
    import soxr

BLOCK_SAMPLES = 1 << 17  # of all channels, decoded or converted at a time: half a megabyte
_QUALITY = "HQ"


@dataclass(frozen=True, eq=False)
class Sound:
    """Decoded sound.

    Args:
        samples: float32 [num_samples], mono, at `sampling_rate`.
        sampling_rate: samples per second after resampling.
        digest: 32 bytes over the samples before mixing and resampling, and their channels.
        rate: samples per second of the source.
        channels: of the source.
        mode: how the source stored its samples, such as "int16" or "aac".
    """

    samples: NDArray[np.float32]
    sampling_rate: int
    digest: bytes
    rate: int
    channels: int
    mode: str


def _resampler(rate: int, sampling_rate: int) -> "soxr.ResampleStream":
    import soxr  # only where something is resampled

    return soxr.ResampleStream(rate, sampling_rate, 1, "float32", _QUALITY)


class SoundBuilder:
    """Takes a sound block by block, so that only the result is ever held whole.

    Channels are averaged, each counting the same; soxr's HQ resamples. Both depend on the samples alone, not
    on how they are cut into blocks.
    """

    def __init__(self, rate: int, channels: int, mode: str, sampling_rate: int, limits: AudioLimits) -> None:
        limits.check_format(rate, channels)
        self.rate, self.channels, self.mode = rate, channels, mode
        self.sampling_rate, self.limits = sampling_rate, limits
        self._digest = SampleDigest(channels)
        self._count = 0
        self._parts: list[NDArray[np.float32]] = []
        self._resampler = None if rate == sampling_rate else _resampler(rate, sampling_rate)

    def add(self, block: NDArray[np.float32]) -> None:
        """float32 [num_samples, channels]. MediaError: too long by now, or a value that is no sound."""
        self._count += len(block)
        self.limits.check_seconds(self._count / self.rate)
        self.limits.check_values(block)
        self._digest.update(block)
        # One channel is copied too: the block is the caller's.
        mono = block[:, 0].copy() if self.channels == 1 else block.mean(axis=1, dtype=np.float32)
        self._keep(mono, last=False)

    def _keep(self, mono: NDArray[np.float32], last: bool) -> None:
        if self._resampler is not None:
            mono = self._resampler.resample_chunk(mono, last=last)
        if len(mono):
            self._parts.append(mono)

    def finish(self) -> Sound:
        """MediaError: there are no samples, or too few to make one at the new rate."""
        self._keep(np.empty(0, np.float32), last=True)
        if not self._parts:
            raise MediaError(f"{self._count} samples at {self.rate} Hz; that is no sound")
        samples = np.concatenate(self._parts)
        return Sound(samples, self.sampling_rate, self._digest.digest(), self.rate, self.channels, self.mode)
