"""Positions of M-RoPE (Wang et al. 2024, section 2.1): one each for time, height and width of every token."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Grid = tuple[int, int, int]  # embeddings over time, height and width


@dataclass(frozen=True, eq=False)
class PositionSpan:
    """Tokens of a prompt whose positions do not simply count on: a medium with its brackets.

    Args:
        start: where in the prompt they begin.
        offsets: int64 [3, num_tokens], their positions less the one the first would have as text.
        advance: what is added to that position to give the next token's.
    """

    start: int
    offsets: NDArray[np.int64]
    advance: int

    @property
    def end(self) -> int:
        return self.start + int(self.offsets.shape[1])


def mrope_positions(num_tokens: int, spans: Sequence[PositionSpan]) -> NDArray[np.int64]:
    """Positions of a prompt of `num_tokens` tokens, int64 [3, num_tokens]; text has the same one three times.

    Generated tokens go on counting from the largest.
    """
    out = np.empty((3, num_tokens), np.int64)
    at = following = 0
    for span in spans:
        out[:, at : span.start] = np.arange(following, following + span.start - at)
        following += span.start - at
        out[:, span.start : span.end] = following + span.offsets
        at, following = span.end, following + span.advance
    out[:, at:] = np.arange(following, following + num_tokens - at)
    return out


def grid_offsets(grid: Grid, *scales: float) -> NDArray[np.int64]:
    """Time, height and width of a grid's embeddings, [3, num_tokens].

    Args:
        scales: their product is positions in time from one step to the next. Times are multiplied by one
            after the other, rounded to float32 each time, then cut off: where they are rounded decides
            whether a time falls just short of a whole number.
    """
    time, row, column = np.indices(grid).reshape(3, -1)
    steps = time.astype(np.float32)
    for scale in scales:
        steps *= np.float32(scale)
    return np.stack((steps.astype(np.int64), row, column))


def bracketed(inner: NDArray[np.int64]) -> tuple[NDArray[np.int64], int]:
    """Offsets of a medium between two brackets, and the advance behind it.

    What follows begins behind the largest position so far. (transformers 5.3 to 5.23 let text behind a long
    video of Qwen2.5-VL begin inside the video's time. This is the training's rule, theirs before, and theirs
    for Qwen2.5-Omni.)
    """
    end = 1 + int(inner.max()) + 1
    edges = np.zeros((3, 1), np.int64)
    return np.concatenate((edges, inner + 1, edges + end), axis=1), end + 1


def interleaved(
    video: NDArray[np.int64], num_audio: int, chunk: int
) -> tuple[list[tuple[str, int, int]], NDArray[np.int64], int]:
    """A video and its sound, laid out by time in turns (Xu et al. 2025, section 2.2: TMRoPE).

    Args:
        video: offsets [3, num_tokens] of the video alone.
        num_audio: embeddings of the sound.
        chunk: positions in time after which the other one takes its turn.

    Returns:
        What stands between the brackets, in turns: "video" or "audio", its first embedding and the one behind
        its last. Offsets of all tokens with two brackets on either side, which share a position; and the
        advance behind them.
    """
    audio = np.broadcast_to(np.arange(num_audio), (3, num_audio))
    parts = {"video": (video, _turns(video[0], chunk)), "audio": (audio, _turns(audio[0], chunk))}
    pieces, offsets = [], []
    for turn in range(max(len(turns) for _, turns in parts.values())):
        for name, (positions, turns) in parts.items():
            if turn < len(turns):
                first, last = turns[turn]
                pieces.append((name, first, last))
                offsets.append(positions[:, first:last])
    end = 1 + int(offsets[-1].max()) + 1  # behind the last turn, as transformers has it
    edges = np.zeros((3, 2), np.int64)
    return pieces, np.concatenate((edges, np.concatenate(offsets, axis=1) + 1, edges + end), axis=1), end + 1


def _turns(times: NDArray[np.int64], chunk: int) -> list[tuple[int, int]]:
    """Tokens of rising times, cut where they pass the next multiple of `chunk`.

    A token passes one multiple: where times jump over several, turns of one token follow, as in transformers.
    """
    turns: list[tuple[int, int]] = []
    first = 0
    for i, time in enumerate(times.tolist()):
        if time >= (len(turns) + 1) * chunk:
            turns.append((first, i))
            first = i
    return [*turns, (first, len(times))]
