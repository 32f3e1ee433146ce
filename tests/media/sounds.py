"""Small sounds, made with soundfile and PyAV, and how they are loaded."""

import io
from dataclasses import replace
from fractions import Fraction
from typing import Any

import av
import numpy as np
import soundfile
from numpy.typing import NDArray

from flexjudge_fast.media.audio import load_sound
from flexjudge_fast.media.audio_pool import AudioDecoder
from flexjudge_fast.media.audio_processor import AudioProcessor
from flexjudge_fast.media.items import MediaItem
from flexjudge_fast.media.sound import Sound

# name: libsndfile's format and subtype
SOUNDFILE_FORMATS = {
    "wav": ("WAV", "PCM_16"),
    "wav-float": ("WAV", "FLOAT"),
    "wav-u8": ("WAV", "PCM_U8"),
    "flac": ("FLAC", "PCM_16"),
    "ogg": ("OGG", "VORBIS"),
    "opus": ("OGG", "OPUS"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
    "aiff": ("AIFF", "PCM_24"),
}
# name: FFmpeg's container and encoder
FFMPEG_FORMATS = {"m4a": ("mp4", "aac"), "mka": ("matroska", "flac"), "adts": ("adts", "aac")}
FORMATS = (*SOUNDFILE_FORMATS, *FFMPEG_FORMATS)


def tones(num_samples: int, rate: int, channels: int = 1) -> NDArray[np.float32]:
    """float32 [num_samples, channels]: a tone of its own and a little noise in each channel."""
    times = np.arange(num_samples)[:, None] / rate
    pitches = 220.0 * (1 + np.arange(channels))
    noise = np.random.default_rng(3).standard_normal((num_samples, channels))
    return (0.4 * np.sin(2 * np.pi * pitches * times) + 0.01 * noise).astype(np.float32)


def make_sound(name: str, samples: NDArray[Any], rate: int) -> bytes:
    """A file of samples [num_samples, channels]."""
    file = io.BytesIO()
    if name in SOUNDFILE_FORMATS:
        kind, subtype = SOUNDFILE_FORMATS[name]
        soundfile.write(file, samples, rate, subtype, format=kind)
        return file.getvalue()
    container, codec = FFMPEG_FORMATS[name]
    with av.open(file, "w", format=container) as output:
        add_sound(output, output.add_stream(codec, rate=rate, layout=_layout(samples)), samples, rate)
    return file.getvalue()


def add_sound(output: Any, stream: Any, samples: NDArray[Any], rate: int, begin: float = 0.0) -> None:
    """Encodes all samples into a stream of an open container, from `begin` seconds on."""
    packed = np.ascontiguousarray(samples, dtype=np.float32).reshape(1, -1)
    frame = av.AudioFrame.from_ndarray(packed, format="flt", layout=_layout(samples))
    frame.sample_rate, frame.pts = rate, round(begin * rate)
    frame.time_base = Fraction(1, rate)
    resampler = av.AudioResampler(stream.format, frame_size=stream.frame_size or 1024)
    for piece in [*resampler.resample(frame), *resampler.resample(None)]:
        output.mux(stream.encode(piece))
    output.mux(stream.encode())


def _layout(samples: NDArray[Any]) -> str:
    return {1: "mono", 2: "stereo"}[samples.shape[1]]


def load(decoder: AudioDecoder, source: object, kind: Any = "audio", **limits: Any) -> Sound:
    """A sound under the name "sounds[0]"; `limits` are fields of the processor."""
    processor = replace(AudioProcessor(), **limits)
    return load_sound(MediaItem(kind, source, "sounds[0]"), processor, decoder)
