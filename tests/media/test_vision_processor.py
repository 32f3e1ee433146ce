"""Preprocessor configurations: published ones are read as transformers does, the rest is refused."""

import random
from dataclasses import replace

import numpy as np
import pytest
from transformers.image_transforms import normalize, rescale
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as their_smart_resize

from flexjudge_fast.errors import MediaError, UnsupportedCheckpointError
from flexjudge_fast.media.items import MediaOptions
from flexjudge_fast.media.smart_resize import smart_resize
from flexjudge_fast.media.vision_processor import VisionProcessor, read_vision_processor
from flexjudge_fast.weights.processor_config import ProcessorConfig

CLIP = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
PATCHES = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}
# As Qwen2.5-VL-7B-Instruct is published, before and since transformers wrote `size`.
OLD = {"min_pixels": 3136, "max_pixels": 12845056, **PATCHES, **CLIP}
OLD |= {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor"}
NEW = {"size": {"shortest_edge": 3136, "longest_edge": 12845056}, **PATCHES, **CLIP, "resample": 3}
NEW |= {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True}
NEW |= {"rescale_factor": 1 / 255, "do_center_crop": None, "crop_size": None}
VIDEO = {**NEW, "fps": 2.0, "min_frames": 4, "max_frames": 768, "do_sample_frames": False}
PUBLISHED = VisionProcessor(max_pixels=12845056)


def read(image, video):
    return read_vision_processor(
        ProcessorConfig("preprocessor_config.json", image),
        ProcessorConfig("video_preprocessor_config.json", video),
    )


def test_published_files():
    older = {**OLD, "size": {"min_pixels": 3136, "max_pixels": 12845056}}
    for image in (OLD, NEW, older):
        for video in ({}, OLD, VIDEO):
            assert read(image, video) == PUBLISHED
    assert read({}, {}) == VisionProcessor()


def test_fields_are_read():
    got = read(
        {"patch_size": 16, "merge_size": 1, "min_pixels": 10, "max_pixels": 20, "image_mean": [0, 0.5, 1]},
        {
            "patch_size": 16,
            "merge_size": 1,
            "image_mean": [0, 0.5, 1],
            "fps": 1,
            "max_frames": 8,
            "max_pixels": 50_000,
        },
    )
    want = VisionProcessor(patch_size=16, merge_size=1, min_pixels=10, max_pixels=20, mean=(0.0, 0.5, 1.0))
    assert got == replace(want, fps=1.0, max_frames=8, video_min_pixels=50_000, video_max_pixels=50_000)
    assert got.factor == 16 and got.grid(3, 32, 64) == (2, 2, 4) and got.num_tokens((2, 2, 4)) == 16


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"do_resize": False}, "do_resize"),
        ({"do_normalize": 1}, "do_normalize"),
        ({"do_center_crop": True}, "do_center_crop"),
        ({"resample": 2}, "resample"),
        ({"patch_size": 0}, "patch_size"),
        ({"patch_size": 14.0}, "patch_size"),
        ({"merge_size": True}, "merge_size"),
        ({"temporal_patch_size": "2"}, "temporal_patch_size"),
        ({"temporal_patch_size": 1 << 30}, "temporal_patch_size"),
        ({"image_mean": [0.5, 0.5]}, "image_mean"),
        ({"image_mean": 0.5}, "image_mean"),
        ({"image_std": [0.5, 0.5, float("nan")]}, "image_std"),
        ({"image_std": [0.5, 0.5, 0]}, "image_std"),
        ({"rescale_factor": -1}, "rescale_factor"),
        ({"min_pixels": 1 << 30}, "max_pixels"),
        ({"max_pixels": 1 << 50}, "max_pixels"),
        ({"size": {"height": 3, "width": 3}}, "size"),
        ({"size": 448}, "size"),
        ({"size": {"shortest_edge": -1}}, "shortest_edge"),
    ],
)
def test_what_cannot_be_computed_is_refused(changed, field):
    with pytest.raises(
        UnsupportedCheckpointError, match=rf"^preprocessor_config.json: field (size\.)?{field}"
    ):
        read({**OLD, **changed}, {})


@pytest.mark.parametrize(
    ("video", "field"),
    [
        ({"fps": 0}, "fps"),
        ({"min_frames": 9, "max_frames": 8}, "min_frames"),
        ({"patch_size": 16}, "patch_size"),
        ({"image_std": [1, 1, 1]}, "image_std"),
        ({"resample": 2}, "resample"),
    ],
)
def test_video_that_differs_is_refused(video, field):
    with pytest.raises(UnsupportedCheckpointError, match=f"^video_preprocessor_config.json: field {field}"):
        read(OLD, video)


def test_smart_resize_is_transformers():
    chance = random.Random(0)
    for _ in range(20_000):
        height, width = (chance.choice([chance.randint(1, 60), chance.randint(1, 5000)]) for _ in range(2))
        factor = chance.choice([28, 32, chance.randint(1, 64)])
        low = chance.choice([1, 3136, chance.randint(1, 10**6)])
        high = low + chance.choice([0, 10, chance.randint(0, 10**7)])
        try:
            want = their_smart_resize(height, width, factor, low, high)
        except ValueError:
            with pytest.raises(MediaError, match="200 times"):
                smart_resize(height, width, factor, low, high)
        else:
            assert smart_resize(height, width, factor, low, high) == want


def test_table_is_transformers():
    """All bytes, three kinds of mean and std, through the functions that the processor calls."""
    image = np.arange(256, dtype=np.uint8).reshape(1, 16, 16).repeat(3, 0)
    chance = np.random.default_rng(0)
    for mean, std in (
        (CLIP["image_mean"], CLIP["image_std"]),
        ([0.5] * 3, [0.5] * 3),
        chance.random((2, 3)) + 0.1,
    ):
        processor = VisionProcessor(mean=tuple(map(float, mean)), std=tuple(map(float, std)))
        want = normalize(rescale(image, 1 / 255), list(mean), list(std), input_data_format="channels_first")
        table = processor.normalization_table()
        assert table.dtype == np.float32 and np.array_equal(table, want.reshape(3, 256))


def test_target_size():
    assert PUBLISHED.target_size(480, 640, MediaOptions()) == (476, 644)
    assert PUBLISHED.target_size(480, 640, MediaOptions(resize=(448, 252))) == (252, 448)
    assert PUBLISHED.target_size(480, 640, MediaOptions(max_pixels=100_000)) == (252, 364)
    assert PUBLISHED.target_size(480, 640, MediaOptions(max_pixels=1000)) == (28, 28)
    with pytest.raises(MediaError, match="not an image"):
        PUBLISHED.target_size(0, 640, MediaOptions())
