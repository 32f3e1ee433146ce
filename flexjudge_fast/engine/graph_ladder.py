"""Which sizes of decode steps have a CUDA graph: rungs that a step is padded up to."""

from bisect import bisect_left
from dataclasses import dataclass

_SMALL = (1, 2, 4, 8)
_STEP = 8  # sequences between larger rungs: at most seven rows are padding


@dataclass(frozen=True)
class Rung:
    """A graph's size: sequences, and blocks of each one's table."""

    num_seqs: int
    table_width: int


class GraphLadder:
    """The rungs for up to `max_num_seqs` sequences of up to `max_blocks` blocks."""

    def __init__(self, max_num_seqs: int, max_blocks: int) -> None:
        larger = range(2 * _STEP, max_num_seqs + 1, _STEP)
        seqs = {n for n in (*_SMALL, *larger) if n <= max_num_seqs} | {max_num_seqs}
        self.num_seqs = tuple(sorted(seqs))
        self.table_widths = tuple(_doublings(max_blocks))

    def pick(self, num_seqs: int, table_width: int) -> Rung | None:
        """The smallest rung that holds the step; `None` if none does."""
        i, j = bisect_left(self.num_seqs, num_seqs), bisect_left(self.table_widths, table_width)
        if num_seqs < 1 or i == len(self.num_seqs) or j == len(self.table_widths):
            return None
        return Rung(self.num_seqs[i], self.table_widths[j])


def _doublings(most: int) -> list[int]:
    """32, 64, 128, ... and `most`."""
    widths, width = [], 32
    while width < most:
        widths.append(width)
        width *= 2
    return [*widths, most]
