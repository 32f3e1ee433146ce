"""Frames and sizes are those of Qwen2.5-VL's own sampling."""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexjudge_fast.errors import InvalidArgumentError, MediaError
from flexjudge_fast.media.items import MediaOptions
from flexjudge_fast.media.video_sampling import FrameBudget, average_fps, frame_indices, sampled_fps

BUDGET = FrameBudget()


@pytest.mark.parametrize(
    ("total", "video_fps", "fps", "expected"),
    [
        (1, 25.0, 2.0, 1),
        (2, 25.0, 2.0, 2),
        (3, 25.0, 2.0, 2),
        (5, 25.0, 2.0, 4),  # at least 4
        (60, 30.0, 2.0, 4),
        (90, 30.0, 2.0, 6),
        (105, 30.0, 2.0, 6),  # 7, floored to even
        (250, 25.0, 2.0, 20),
        (250, 25.0, 1.0, 10),
        (250, 25.0, 100.0, 250),  # at most all
        (251, 25.0, 100.0, 250),
        (30_000, 25.0, 2.0, 768),  # at most 768
        (300, 30000 / 1001, 2.0, 20),
    ],
)
def test_number_of_frames(total: int, video_fps: float, fps: float, expected: int) -> None:
    assert BUDGET.with_options(MediaOptions(fps=fps)).num_frames(total, video_fps) == expected


def test_odd_bounds_become_even() -> None:
    budget = FrameBudget(min_frames=5, max_frames=9)
    assert budget.num_frames(100, 100.0) == 6
    assert budget.num_frames(100, 1.0) == 8


@settings(deadline=None)
@given(st.integers(1, 40_000), st.floats(0.01, 1000), st.floats(0.01, 1000))
def test_the_number_of_frames_is_always_possible(total: int, video_fps: float, fps: float) -> None:
    count = BUDGET.with_options(MediaOptions(fps=fps)).num_frames(total, video_fps)
    assert 1 <= count <= min(total, 768)
    assert count % 2 == 0 or total == count == 1


def test_indices_are_those_of_torch() -> None:
    rng = random.Random(3)
    cases = [(total, count) for total in range(2, 90) for count in range(2, total + 1)]
    cases += [(rng.randint(768, 40_000), 2 * rng.randint(1, 384)) for _ in range(400)]
    for total, count in cases:
        expected = torch.linspace(0, total - 1, count).round().long().tolist()
        assert frame_indices(total, count) == expected, (total, count)
    assert frame_indices(1, 1) == [0]


def test_rate_of_the_sampled_frames() -> None:
    assert sampled_fps(250, 20, 25.0) == 2.0
    assert BUDGET.temporal / sampled_fps(250, 20, 25.0) == 1.0  # seconds per grid


@pytest.mark.parametrize(
    ("total", "duration", "stated", "expected"),
    [
        (60, 2.001, 30.0, 30.0),  # rounded time stamps
        (300, 10.01, 30000 / 1001, 30000 / 1001),
        (60, 6.0, 30.0, 10.0),  # the header lies
        (60, 2.0, None, 30.0),
        (60, 2.0, math.nan, 30.0),
        (60, 2.0, -1.0, 30.0),
        (60, 0.0, 30.0, 30.0),  # no time stamps
        (60, 0.0, None, None),
        (60, 0.0, 1e9, None),
    ],
)
def test_average_rate(total: int, duration: float, stated: float | None, expected: float | None) -> None:
    assert average_fps(total, duration, stated) == expected


def test_size_of_a_frame() -> None:
    assert BUDGET.frame_size(360, 640, 4) == (364, 644)
    assert BUDGET.frame_size(1080, 1920, 4) == (560, 1008)  # at most 768 patches of 28 x 28
    assert BUDGET.frame_size(48, 64, 4) == (280, 392)  # at least 128


@pytest.mark.parametrize("count", [2, 64, 100, 300, 768])
def test_many_frames_share_the_pixels(count: int) -> None:
    height, width = BUDGET.frame_size(1080, 1920, count)
    share = BUDGET.total_pixels / count * 2
    assert height * width <= max(min(BUDGET.max_pixels, share), int(BUDGET.min_pixels * 1.05))


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 4000), st.integers(1, 4000), st.integers(1, 768), st.integers(800, 10**6))
def test_sizes_hold_the_bounds(height: int, width: int, count: int, most: int) -> None:
    budget = BUDGET.with_options(MediaOptions(max_pixels=most))
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(MediaError):
            budget.frame_size(height, width, count)
        return
    rows, columns = budget.frame_size(height, width, count)
    assert rows % 28 == columns % 28 == 0
    assert rows > 0 and columns > 0
    if max(height, width) < 10 * min(height, width) and most > 3 * BUDGET.min_pixels:
        assert rows * columns <= most


def test_options_change_the_budget() -> None:
    budget = BUDGET.with_options(MediaOptions(max_pixels=50_000, fps=1.0, resize=(280, 56)))
    assert (budget.min_pixels, budget.max_pixels, budget.fps) == (50_000, 50_000, 1.0)
    assert budget.resize == (280, 56)
    assert BUDGET.with_options(MediaOptions()) == BUDGET
    assert BUDGET.with_options(MediaOptions(resize=(560, 280))).frame_size(1, 4000, 4) == (280, 560)


@pytest.mark.parametrize(
    "options", [{"fps": 0.0}, {"fps": math.nan}, {"fps": -1.0}, {"max_pixels": 0}, {"resize": (0, 5)}]
)
def test_impossible_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(InvalidArgumentError, match=next(iter(options))):
        BUDGET.with_options(MediaOptions(**options))  # type: ignore[arg-type]
