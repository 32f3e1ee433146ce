"""The tensors of a step: nothing of the step before may be left in them."""

from types import SimpleNamespace

import torch

from flexjudge_fast.engine.batch import Batch, Chunk
from flexjudge_fast.engine.input_buffers import InputBuffers


def chunk(start, count, blocks, length=100):
    """A chunk of a request whose token ids are 1000, 1001, ...; only its last token needs logits."""
    request = SimpleNamespace(
        token_ids=list(range(1000, 1000 + length)), block_table=blocks, first_logit=0, media=()
    )
    request.first_logit = start + count - 1
    return Chunk(request, start, count)


def fill(buffers, *chunks):
    return buffers.fill(Batch(chunks, ()))


def check(found, ids, positions, slots, tables, starts, lens, rows):
    assert found.token_ids.tolist() == ids
    attention = found.attention
    assert attention.positions.tolist() == positions
    assert attention.slot_mapping.tolist() == slots
    assert attention.query_start.tolist() == starts
    assert attention.context_lens.tolist() == lens
    assert attention.max_context == max(lens, default=0)
    assert found.logit_rows.tolist() == rows
    assert attention.block_tables.is_contiguous()
    for row, table in zip(attention.block_tables.tolist(), tables, strict=True):
        assert row[: len(table)] == table


def test_wide_then_narrow_then_wide():
    buffers = InputBuffers(16, 4, 8, 4, torch.device("cpu"))
    wide = fill(buffers, chunk(6, 4, [9, 8, 7]), chunk(2, 1, [5]), chunk(0, 3, [6]))
    check(
        wide,
        [1006, 1007, 1008, 1009, 1002, 1000, 1001, 1002],
        [6, 7, 8, 9, 2, 0, 1, 2],
        [34, 35, 28, 29, 22, 24, 25, 26],
        [[9, 8, 7], [5], [6]],
        [0, 4, 5, 8],
        [10, 3, 3],
        [3, 4, 7],
    )
    narrow = fill(buffers, chunk(3, 1, [5]))
    check(narrow, [1003], [3], [23], [[5]], [0, 1], [4], [0])
    assert narrow.attention.block_tables.shape == (1, 1)
    again = fill(buffers, chunk(4, 1, [2, 3]), chunk(9, 1, [1, 2, 4]))
    check(again, [1004, 1009], [4, 9], [12, 17], [[2, 3], [1, 2, 4]], [0, 1, 2], [5, 10], [0, 1])


def test_an_empty_step():
    buffers = InputBuffers(16, 4, 8, 4, torch.device("cpu"))
    fill(buffers, chunk(0, 3, [6]))
    check(fill(buffers), [], [], [], [], [0], [], [])
