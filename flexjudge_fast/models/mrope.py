"""Positions of M-RoPE (Wang et al. 2024, section 2.1): one each for time, height and width of every token."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class GridRun:
    """A medium's placeholders in a prompt.

    Args:
        start: position of the first one in the prompt.
        grid: embeddings over time, height and width.
        time_step: positions from one embedding to the next in time; 1 for an image.
    """

    start: int
    grid: tuple[int, int, int]
    time_step: float = 1.0

    @property
    def num_tokens(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]


def mrope_positions(num_tokens: int, runs: Sequence[GridRun]) -> NDArray[np.int64]:
    """Positions of a prompt of `num_tokens` tokens with media at `runs`, in order.

    Text has the same position three times. A medium's tokens count from where the text stopped, by their
    place in the grid; what follows begins behind the largest position so far. (transformers 5.3 to 5.23 let
    text behind a long video begin inside the video's time; this is the training's rule, and theirs before.)

    Returns:
        int64 [3, num_tokens]: time, height, width. Generated tokens go on counting from the largest.
    """
    out = np.empty((3, num_tokens), np.int64)
    at = following = 0
    for run in runs:
        out[:, at : run.start] = np.arange(following, following + run.start - at)
        following += run.start - at
        at = run.start + run.num_tokens
        time, row, column = np.indices(run.grid).reshape(3, -1)
        out[0, run.start : at] = following + (time.astype(np.float32) * np.float32(run.time_step)).astype(
            np.int64
        )
        out[1, run.start : at] = following + row
        out[2, run.start : at] = following + column
        following = int(out[:, run.start : at].max()) + 1
    out[:, at:] = np.arange(following, following + num_tokens - at)
    return out
