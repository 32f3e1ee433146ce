"""Log-mel frames equal those of transformers; configurations that ask for something else are refused."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import WhisperFeatureExtractor

from flexjudge_fast.errors import InvalidArgumentError, UnsupportedCheckpointError
from flexjudge_fast.media.audio_processor import AudioProcessor, read_audio_processor
from flexjudge_fast.media.log_mel import log_mel, mel_filters
from flexjudge_fast.weights.processor_config import ProcessorConfig

PROCESSOR = AudioProcessor()
PUBLISHED = {  # of Qwen/Qwen2.5-Omni-7B
    "chunk_length": 300,
    "dither": 0.0,
    "do_normalize": True,  # of images
    "feature_extractor_type": "WhisperFeatureExtractor",
    "feature_size": 128,
    "hop_length": 160,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "Qwen2VLImageProcessor",
    "max_pixels": 12845056,
    "merge_size": 2,
    "n_fft": 400,
    "n_samples": 4800000,
    "nb_max_frames": 30000,
    "padding_side": "right",
    "padding_value": 0.0,
    "patch_size": 14,
    "processor_class": "Qwen2_5OmniProcessor",
    "return_attention_mask": True,
    "sampling_rate": 16000,
}


def read(fields: dict[str, Any]) -> AudioProcessor:
    return read_audio_processor(ProcessorConfig("preprocessor_config.json", fields))


def extractor(processor: AudioProcessor) -> WhisperFeatureExtractor:
    return WhisperFeatureExtractor(
        feature_size=processor.feature_size,
        hop_length=processor.hop_length,
        chunk_length=processor.chunk_length,
        n_fft=processor.n_fft,
    )


def expected(samples: NDArray[np.float32], processor: AudioProcessor) -> tuple[NDArray[np.float32], int]:
    """The features as Qwen2_5OmniProcessor asks for them, padding and all, and how many of them it keeps."""
    found = extractor(processor)(
        samples, sampling_rate=16000, padding="max_length", return_attention_mask=True, return_tensors="np"
    )
    return found["input_features"][0], int(found["attention_mask"].sum())


def sound(kind: str, count: int) -> NDArray[np.float32]:
    rng = np.random.default_rng(count)
    samples = {
        "noise": 0.1 * rng.standard_normal(count),
        "silence": np.zeros(count),
        "end": np.sin(np.arange(count) / 20) * (np.arange(count) > 0.9 * count),  # loudest in the last frames
        "click": (np.arange(count) == count - 1) * 0.9,  # heard most beyond the last frame
        "quiet": 1e-6 * rng.standard_normal(count),
    }[kind]
    return samples.astype(np.float32)


def check(samples: NDArray[np.float32], processor: AudioProcessor) -> None:
    """Equal to the bit where this was written (torch 2.13, MKL); other machines may sum in another order."""
    features, valid = expected(samples, processor)
    found = log_mel(samples, processor)
    assert found.dtype == np.float32 and found.flags.c_contiguous
    assert found.shape == (processor.feature_size, max(valid, processor.min_frames))
    np.testing.assert_allclose(found, features[:, : found.shape[1]], rtol=0, atol=1e-6)


SHORT = replace(PROCESSOR, chunk_length=4)
COUNTS = (1, 2, 159, 160, 161, 199, 200, 201, 320, 321, 399, 400, 401, 440, 480, 481, 1599, 1600)
COUNTS += (5000, 16000, 16001, 16159, 31999, 63399, 63599, 63600, 63601, 63839, 63841, 63999, 64000)


@pytest.mark.parametrize("kind", ["noise", "silence", "end", "click", "quiet"])
@pytest.mark.parametrize("count", COUNTS)
def test_frames_equal_those_of_transformers(kind: str, count: int) -> None:
    check(sound(kind, count), SHORT)


@pytest.mark.parametrize("count", [160, 16001, 4_799_840, 4_799_999, 4_800_000])
def test_up_to_the_longest_sound(count: int) -> None:
    """10 ms, a second, 299.99 s and the last samples, as the published model pads them."""
    check(sound("end", count), PROCESSOR)


@pytest.mark.parametrize(
    "other",
    [{"feature_size": 80}, {"hop_length": 200, "n_fft": 512}, {"feature_size": 40, "n_fft": 1024}],
)
def test_other_settings(other: dict[str, int]) -> None:
    check(sound("noise", 20_001), replace(SHORT, **other))


@pytest.mark.parametrize("feature_size", [40, 80, 128])
def test_filters(feature_size: int) -> None:
    processor = replace(PROCESSOR, feature_size=feature_size)
    filters = mel_filters(processor)
    assert filters.shape == (feature_size, 201)
    np.testing.assert_allclose(filters.T, extractor(processor).mel_filters, rtol=0, atol=1e-15)
    areas = filters.sum(axis=1) * 40.0  # bins are 40 Hz apart; narrow triangles are sampled coarsely
    assert np.abs(areas[-10:] - 1).max() < 0.01


def test_tokens_are_those_of_transformers() -> None:
    from transformers.models.qwen2_5_omni.processing_qwen2_5_omni import _get_feat_extract_output_lengths

    frames = range(1, 3000)
    assert [PROCESSOR.num_tokens(n) for n in frames] == [_get_feat_extract_output_lengths(n) for n in frames]
    assert [PROCESSOR.num_tokens(n) for n in (2, 3, 4, 5, 100, 30_000)] == [0, 1, 1, 1, 25, 7500]
    assert PROCESSOR.num_tokens(PROCESSOR.num_frames(1)) == 1
    assert [PROCESSOR.num_frames(n) for n in (1, 480, 481, 4_800_000)] == [3, 3, 4, 30_000]


@pytest.mark.parametrize(
    "samples",
    [
        np.zeros(0, np.float32),
        np.zeros(10, np.float64),
        np.zeros((2, 10), np.float32),
        np.zeros(64_001, np.float32),
    ],
)
def test_what_is_no_sound_is_refused(samples: NDArray[np.float32]) -> None:
    with pytest.raises(InvalidArgumentError, match="samples: "):
        log_mel(samples, SHORT)


def test_the_published_configuration() -> None:
    assert read(PUBLISHED) == read({}) == PROCESSOR
    changed = {**PUBLISHED, "chunk_length": 30, "n_samples": 480_000, "nb_max_frames": None}
    assert read(changed) == replace(PROCESSOR, chunk_length=30)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dither", 1e-4),
        ("dither", False),
        ("padding_side", "left"),
        ("padding_value", 1.0),
        ("return_attention_mask", False),
        ("return_attention_mask", 1),
        ("feature_extractor_type", "SeamlessM4TFeatureExtractor"),
        ("sampling_rate", 8000),
        ("sampling_rate", 16000.0),
        ("sampling_rate", 48000),
        ("feature_size", 0),
        ("feature_size", True),
        ("feature_size", "128"),
        ("feature_size", 1 << 40),
        ("n_fft", 401),
        ("n_fft", -400),
        ("hop_length", 201),
        ("hop_length", 161),
        ("chunk_length", 10**9),
        ("n_samples", 480_000),
        ("nb_max_frames", 3000),
    ],
)
def test_what_is_not_supported_is_named(name: str, value: object) -> None:
    with pytest.raises(UnsupportedCheckpointError, match=rf"^preprocessor_config.json: field {name}: "):
        read({**PUBLISHED, name: value})


@pytest.mark.parametrize("count", [1, 1601, 8000, 16001])
def test_the_same_bits_whatever_the_number_of_threads(count: int) -> None:
    """torch fixes a thread's own number at its first op, so that a pool's threads may differ."""
    samples = sound("noise", count)
    before, found = torch.get_num_threads(), []
    try:
        for number in (1, 4, 16):
            with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(number,)) as pool:
                found.append(pool.submit(log_mel, samples, SHORT).result())
    finally:
        torch.set_num_threads(before)
    assert all(np.array_equal(found[0], other) for other in found[1:])
