"""Resized frames and patches: the bytes of Pillow and of transformers, whatever the size and the threads."""

import random

import numpy as np
import pytest
import torch
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from flexjudge_fast.ops.image import patchify, patchify_reference, resize_bicubic, resize_bicubic_reference

pytestmark = pytest.mark.usefixtures("compiled")


def random_frames(rng: np.random.Generator, *shape: int) -> torch.Tensor:
    """Noise or black and white: the hardest for rounding and for clipping."""
    top = rng.choice([2, 256])
    return torch.from_numpy((rng.integers(0, top, (*shape, 3)) * (255 // (top - 1))).astype(np.uint8))


def random_side(chance: random.Random) -> int:
    return chance.choice([1, 2, 3, 5, 28, chance.randint(1, 40), chance.randint(1, 300)])


@pytest.mark.parametrize("seed", range(8))
def test_resize_is_pillow(seed):
    """480 sizes: a pixel, larger, smaller, one side only, one to four frames."""
    chance, rng = random.Random(seed), np.random.default_rng(seed)
    for _ in range(60):
        height, width, to_height, to_width = (random_side(chance) for _ in range(4))
        frames = random_frames(rng, chance.choice([1, 1, 2, 4]), height, width)
        got = resize_bicubic(frames, to_height, to_width, chance.choice([1, 2, 3]))
        assert torch.equal(got, resize_bicubic_reference(frames, to_height, to_width)), (
            frames.shape,
            to_height,
            to_width,
        )


@pytest.mark.parametrize(
    ("size", "to"),
    [
        ((1, 5000), (28, 28)),
        ((5000, 1), (28, 28)),
        ((7, 1400), (280, 28)),
        ((900, 1200), (448, 448)),
        ((60, 54), (10, 29)),  # the height loses twice as many rows as the width: still across first
        ((61, 54), (10, 29)),  # a row more: down first
        ((448, 448), (448, 448)),
        ((31, 17), (448, 1204)),
    ],
)
def test_extreme_sizes_are_pillow(size, to):
    frames = random_frames(np.random.default_rng(3), 1, *size)
    assert torch.equal(resize_bicubic(frames, *to, 2), resize_bicubic_reference(frames, *to))


def test_resize_copies():
    """A result never shares memory with its input, and strides of the input do not matter."""
    frames = random_frames(np.random.default_rng(0), 2, 9, 11)
    assert resize_bicubic(frames, 9, 11).data_ptr() != frames.data_ptr()
    turned = frames.transpose(1, 2)
    assert torch.equal(resize_bicubic(turned, 5, 5), resize_bicubic(turned.contiguous(), 5, 5))


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2), (3, 1, 2), (14, 2, 2), (4, 3, 3)])
def test_patchify_is_the_reference(sizes):
    """One to five frames, the last repeated; threads change nothing."""
    rng = np.random.default_rng(1)
    unit = sizes[0] * sizes[1]
    table = torch.from_numpy(rng.standard_normal((3, 256)).astype(np.float32))
    for num_frames in range(1, 6):
        frames = random_frames(rng, num_frames, 2 * unit, 3 * unit)
        want = patchify_reference(frames, table, *sizes)
        for threads in (1, 2, 5):
            assert torch.equal(patchify(frames, table, *sizes, threads), want)


def test_patchify_is_transformers():
    """An image is a video of one frame."""
    frames = random_frames(np.random.default_rng(2), 1, 56, 84)
    table = torch.arange(256).expand(3, 256).float().contiguous()
    planes = frames[0].permute(2, 0, 1).numpy()
    want, *_ = Qwen2VLImageProcessorPil().patchify(planes, patch_size=14, merge_size=2, temporal_patch_size=2)
    assert np.array_equal(patchify(frames, table, 14, 2, 2).numpy(), want)


FRAMES, TABLE = torch.zeros(1, 28, 28, 3, dtype=torch.uint8), torch.zeros(3, 256)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda: resize_bicubic(FRAMES.float(), 28, 28), "uint8"),
        (lambda: resize_bicubic(FRAMES[0], 28, 28), "uint8"),
        (lambda: resize_bicubic(FRAMES[..., :2], 28, 28), "uint8"),
        (lambda: resize_bicubic(FRAMES, 0, 28), "height and width"),
        (lambda: resize_bicubic(FRAMES, 28, 2**40), "height and width"),
        (lambda: resize_bicubic(FRAMES[:, :0], 28, 28), "height and width"),
        (lambda: resize_bicubic(FRAMES.expand(20, -1, -1, -1), 2**17, 2**17), "too many frames"),
        (lambda: resize_bicubic(FRAMES, 28, 28, 0), "threads"),
        (lambda: patchify(FRAMES, TABLE, 14, 3, 2), "multiples of 42"),
        (lambda: patchify(FRAMES, TABLE, 2**62, 2, 2), "1 to 256"),
        (lambda: patchify(FRAMES, TABLE, 14, 0, 2), "1 to 256"),
        (lambda: patchify(FRAMES, TABLE[:2], 14, 2, 2), "table"),
        (lambda: patchify(FRAMES, TABLE.double(), 14, 2, 2), "table"),
        (lambda: patchify(FRAMES[:0], TABLE, 14, 2, 2), "a frame"),
    ],
)
def test_wrong_arguments_are_refused(call, reason):
    with pytest.raises(RuntimeError, match=reason):
        call()
