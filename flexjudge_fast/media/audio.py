"""Sound from any source to log-mel features: what every kind of source becomes is defined here."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from flexjudge_fast.errors import MediaError
from flexjudge_fast.media.audio_limits import AudioLimits
from flexjudge_fast.media.audio_pool import AudioDecoder
from flexjudge_fast.media.audio_processor import AudioProcessor
from flexjudge_fast.media.items import MediaItem
from flexjudge_fast.media.keys import audio_key
from flexjudge_fast.media.log_mel import log_mel
from flexjudge_fast.media.prepared import PreparedAudio
from flexjudge_fast.media.sample_types import check_type, to_float32
from flexjudge_fast.media.sound import BLOCK_SAMPLES, Sound, SoundBuilder
from flexjudge_fast.media.source import describe, is_remote, read_source
from flexjudge_fast.media.worker_pool import FileSource

Samples = NDArray[np.generic]


def prepare_audio(
    item: MediaItem,
    processor: AudioProcessor,
    salt: bytes,
    decoder: AudioDecoder,
    allow_remote: bool = False,
) -> PreparedAudio:
    """A sound read, turned into features and named by its content. Safe to call from several threads.

    Args:
        item: see `load_sound`.
        salt: what the embeddings depend on beside samples and processor: the model, its dtype.
        decoder: decodes files; its limits hold for arrays too.

    Raises:
        MediaError: it cannot be read, or a limit is passed; the message begins with item.name.
    """
    sound = load_sound(item, processor, decoder, allow_remote)
    features = log_mel(sound.samples, processor)
    key = audio_key(samples=sound.digest, rate=sound.rate, processor=processor, salt=salt)
    seconds = len(sound.samples) / sound.sampling_rate
    return PreparedAudio("audio", key, features, processor.num_tokens(features.shape[1]), seconds)


def load_sound(
    item: MediaItem, processor: AudioProcessor, decoder: AudioDecoder, allow_remote: bool = False
) -> Sound:
    """A sound as mono samples at the processor's rate.

    Sources: a path, bytes, a `data:` URL in base64, an http(s) URL if `allow_remote`; samples and their rate
    as a tuple or as a mapping with "array" and "sampling_rate". Samples are a numpy array or a torch tensor,
    [num_samples] or two-dimensional, whose smaller dimension is the channels. If `item.kind` is "video", the
    file is a video and its first sound track is taken, from the time of the video's first frame on: where the
    track begins later, it is preceded by silence.

    - Channels are averaged; other rates are resampled by soxr (HQ).
    - uint8, int16 and int32 are scaled to -1..1; floats (of a tensor, bfloat16, too) are kept, also somewhat
      beyond -1..1.
    - NaN, infinite values and values beyond -16..16 are refused.
    - Silence and very short sound are sound; too short for one token, it is followed by silence.
    - What lasts longer than the processor's `chunk_length` or the decoder's limit is refused, not cut.

    Raises:
        MediaError: beginning with item.name and a description of the source.
    """
    limits = decoder.limits
    limits = replace(limits, max_seconds=min(limits.max_seconds, processor.chunk_length))
    if item.kind == "video":
        limits = replace(limits, max_file_bytes=limits.max_video_bytes)
    source = item.source
    try:
        if item.kind == "video" and isinstance(source, list | tuple | np.ndarray | torch.Tensor):
            raise MediaError("frames have no sound track; give the file, or use_audio_in_video=False")
        if isinstance(source, tuple | Mapping):
            return _from_samples(*_samples_and_rate(source), processor.sampling_rate, limits)
        if isinstance(source, np.ndarray | torch.Tensor):
            raise MediaError("give samples with their rate: (samples, rate)")
        file = _file(source, limits, allow_remote)
        return decoder.decode(file, processor.sampling_rate, limits, of_video=item.kind == "video")
    except MediaError as error:
        raise MediaError(f"{item.name or item.kind}: {_describe(source)}: {error}") from error


def _file(source: object, limits: AudioLimits, allow_remote: bool) -> FileSource:
    """What the decoder opens: a path, or bytes."""
    is_url = isinstance(source, str) and (source[:5].lower() in ("data:", "file:") or is_remote(source))
    if isinstance(source, str | os.PathLike | bytes | bytearray | memoryview) and not is_url:
        return source
    return read_source(source, limits.max_file_bytes, allow_remote)  # or an error that says why not


def _samples_and_rate(source: tuple[Any, ...] | Mapping[str, Any]) -> tuple[Samples, int]:
    """From (samples, rate) or {"array": samples, "sampling_rate": rate}."""
    if isinstance(source, Mapping):
        if not {"array", "sampling_rate"} <= set(source):
            raise MediaError('a mapping must have "array" and "sampling_rate"')
        source = (source["array"], source["sampling_rate"])
    if len(source) != 2:
        raise MediaError(f"a tuple of {len(source)}; give (samples, rate)")
    given, rate = source
    if isinstance(rate, np.ndarray | torch.Tensor) and rate.ndim:
        raise MediaError("the other way round: give (samples, rate)")
    if not isinstance(rate, int | float | np.integer | np.floating) or isinstance(rate, bool):
        raise MediaError(f"a rate of type {type(rate).__name__}; give a plain number: (samples, rate)")
    if isinstance(given, torch.Tensor):
        if given.layout is not torch.strided:
            raise MediaError(f"samples in a tensor of layout {given.layout}; give a dense one")
        if given.dtype is torch.bfloat16:  # numpy has none
            given = given.float()
        check_type(str(given.dtype).removeprefix("torch."))
        given = given.detach().cpu().numpy()
    if not isinstance(given, np.ndarray):
        raise MediaError(f"samples of type {type(given).__name__}; give a numpy array or a torch tensor")
    return given, rate  # type: ignore[return-value]  # whether it is a whole number is checked with its range


def _from_samples(samples: Samples, rate: float, sampling_rate: int, limits: AudioLimits) -> Sound:
    check_type(samples.dtype.name)
    shaped = _channels_last(samples)
    limits.check_format(rate, shaped.shape[1])
    limits.check_seconds(len(shaped) / rate)
    builder = SoundBuilder(int(rate), shaped.shape[1], samples.dtype.name, sampling_rate, limits)
    for block in _blocks(shaped):
        builder.add(to_float32(block))
    return builder.finish()


def _channels_last(samples: Samples) -> Samples:
    """[num_samples, channels]."""
    if samples.ndim == 1:
        return samples[:, None]
    if samples.ndim != 2:
        raise MediaError(f"samples of shape {list(samples.shape)}; give [num_samples] or two dimensions")
    rows, columns = samples.shape
    if rows == columns:
        raise MediaError(f"samples of shape {[rows, columns]}: which dimension is the channels?")
    return samples if columns < rows else samples.T


def _blocks(samples: Samples) -> Iterator[Samples]:
    step = max(BLOCK_SAMPLES // samples.shape[1], 1)
    for i in range(0, len(samples), step):
        yield samples[i : i + step]


def _describe(source: object) -> str:
    """A source in a few words, for messages."""
    if isinstance(source, Mapping):
        source = source.get("array")
    elif isinstance(source, tuple) and source:
        source = source[0]
    if isinstance(source, np.ndarray | torch.Tensor):
        return f"{source.dtype} {list(source.shape)}"
    return describe(source)
