"""Rungs of recorded decode steps: the smallest that holds a step, never one that does not."""

import pytest

from flexjudge_fast.engine.graph_ladder import GraphLadder, Rung


@pytest.mark.parametrize("max_num_seqs", [1, 2, 3, 7, 8, 9, 16, 17, 64, 100])
@pytest.mark.parametrize("max_blocks", [1, 31, 32, 33, 100, 2049])
def test_every_step_has_the_smallest_rung(max_num_seqs: int, max_blocks: int) -> None:
    ladder = GraphLadder(max_num_seqs, max_blocks)
    rungs = [Rung(n, w) for n in ladder.num_seqs for w in ladder.table_widths]
    for num_seqs in range(1, max_num_seqs + 1):
        for width in {1, 31, 32, 33, 64, 65, max_blocks} & set(range(1, max_blocks + 1)):
            found = ladder.pick(num_seqs, width)
            fitting = [r for r in rungs if r.num_seqs >= num_seqs and r.table_width >= width]
            assert found == min(fitting, key=lambda rung: (rung.num_seqs, rung.table_width))
            assert found.num_seqs - num_seqs <= 7  # rows of padding


def test_what_no_rung_holds() -> None:
    ladder = GraphLadder(16, 64)
    assert ladder.pick(0, 1) is None
    assert ladder.pick(17, 1) is None
    assert ladder.pick(1, 65) is None


def test_few_graphs() -> None:
    """Each takes time to record, and memory."""
    ladder = GraphLadder(64, 2049)
    assert len(ladder.num_seqs) <= 12 and len(ladder.table_widths) <= 8
