"""Log-mel frames of sound, equal to WhisperFeatureExtractor's, without its padding to the longest sound."""

import numpy as np
import torch
from numpy.typing import NDArray

from flexjudge_fast.errors import InvalidArgumentError
from flexjudge_fast.media.audio_processor import AudioProcessor

_HIGHEST = 8000.0  # Hz; the last filter ends here
_LEAST_POWER = 1e-10
_RANGE = 8.0  # powers of ten below the loudest that are kept
_BREAK_HZ, _BREAK_MEL = 1000.0, 15.0  # Slaney's scale is linear below, logarithmic above
_LOG_STEP = np.log(6.4) / 27.0  # natural logarithm of a mel's ratio above the break


def log_mel(samples: NDArray[np.float32], processor: AudioProcessor) -> NDArray[np.float32]:
    """The frames that are the sound's own, not those of the silence that transformers appends to it.

    Values are relative to the loudest of the whole spectrogram, silence included; the last frames hear the
    silence that follows. Two further frames are therefore computed than are returned.

    Args:
        samples: float32 [num_samples], mono, at the processor's rate.

    Returns:
        float32 [feature_size, num_frames], contiguous; `AudioProcessor.num_frames` of them.

    Raises:
        InvalidArgumentError: no samples, more than `max_samples`, or not float32 [num_samples].
    """
    if samples.dtype != np.float32 or samples.ndim != 1 or not 0 < len(samples) <= processor.max_samples:
        raise InvalidArgumentError(
            f"samples: {samples.dtype} {list(samples.shape)}; "
            f"give float32 [num_samples], 1 to {processor.max_samples:,}"
        )
    hop, n_fft = processor.hop_length, processor.n_fft
    num_frames = processor.num_frames(len(samples))
    # Enough silence that neither a frame that hears the sound nor its mirror image at the end is cut.
    length = min(num_frames * hop + 2 * n_fft, processor.max_samples)
    padded = torch.zeros(-(-length // hop) * hop)
    padded[: len(samples)] = torch.from_numpy(samples)
    spectrum = torch.stft(padded, n_fft, hop, window=torch.hann_window(n_fft), return_complex=True)
    power = (spectrum[:, :-1].abs() ** 2).contiguous()  # [n_fft / 2 + 1, frames]
    del spectrum
    mels = torch.from_numpy(_filtered(power.numpy(), mel_filters(processor).astype(np.float32)))
    logs = torch.clamp(mels, min=_LEAST_POWER).log10()
    floor = logs.max() - _RANGE
    found: NDArray[np.float32] = ((torch.maximum(logs[:, :num_frames], floor) + 4.0) / 4.0).numpy()
    return np.ascontiguousarray(found)


def _filtered(power: NDArray[np.float32], filters: NDArray[np.float32]) -> NDArray[np.float32]:
    """`filters @ power`, each sum in the order of frequencies: a library's product rounds as its threads are.

    Args:
        power: [num_frequencies, frames]; filters: [feature_size, num_frequencies], few of which are not 0.
    """
    mels = np.zeros((len(filters), power.shape[1]), np.float32)
    for mel, weights in zip(mels, filters, strict=True):
        for frequency in weights.nonzero()[0]:
            mel += weights[frequency] * power[frequency]
    return mels


def mel_filters(processor: AudioProcessor) -> NDArray[np.float64]:
    """float64 [feature_size, n_fft / 2 + 1]: how much each frequency counts in each mel bin.

    Triangles whose corners are evenly spaced on Slaney's scale, each of area 1 over frequency in Hz.
    """
    last = _BREAK_MEL + np.log(_HIGHEST / _BREAK_HZ) / _LOG_STEP
    mels = np.linspace(0.0, last, processor.feature_size + 2)
    above = _BREAK_HZ * np.exp((mels - _BREAK_MEL) * _LOG_STEP)
    corners = np.where(mels < _BREAK_MEL, mels * (_BREAK_HZ / _BREAK_MEL), above)
    low, top, high = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    frequencies = np.linspace(0.0, processor.sampling_rate / 2, processor.n_fft // 2 + 1)
    triangles = np.minimum((frequencies - low) / (top - low), (high - frequencies) / (high - top))
    filters: NDArray[np.float64] = np.maximum(triangles, 0.0) * (2.0 / (high - low))
    return filters
