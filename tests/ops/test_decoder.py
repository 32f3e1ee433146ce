"""The decoder op by itself: what it refuses, and which rows it tells finite. Its numbers: tests/parity."""

import pytest
import torch

from flexjudge_fast.layers.attention import AttentionInput
from flexjudge_fast.models.config import read_decoder_config
from flexjudge_fast.models.registry import load_model
from flexjudge_fast.weights.checkpoint import open_checkpoint
from tests.models import write_checkpoint

pytestmark = pytest.mark.usefixtures("compiled")
BLOCKS, BLOCK_SIZE, MAX_LEN = 4, 16, 64


@pytest.fixture
def model(tmp_path):
    """Made anew for each instruction set: they work in scratch of different sizes."""
    write_checkpoint(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    config = read_decoder_config(checkpoint.config)
    return load_model(checkpoint, config, torch.float32, torch.device("cpu"), MAX_LEN, num_threads=2)


def run(model, ids, positions=None, lens=None):
    """Logits and finiteness of every token of sequences of `lens` tokens; of one, when `None`."""
    config, n = model.config, len(ids)
    shape = (config.num_layers, 2, BLOCKS, BLOCK_SIZE, config.num_kv_heads, config.head_dim)
    lens = [n] if lens is None else lens
    offsets = torch.cat([torch.arange(count) for count in lens])
    inputs = AttentionInput(
        offsets if positions is None else positions,
        offsets + BLOCK_SIZE * torch.arange(1, len(lens) + 1).repeat_interleave(torch.tensor(lens)),
        torch.tensor([[1], [2]])[: len(lens)],
        torch.tensor([0, *lens]).cumsum(0),
        torch.tensor(lens),
        max(lens),
    )
    return model.step(torch.tensor(ids), inputs, torch.zeros(shape), torch.arange(n))


def test_ids_and_positions_are_checked(model, isa):
    for ids in ([-1], [320], [5, 1 << 40]):
        with pytest.raises(RuntimeError, match="token id is out of range"):
            run(model, ids)
    for position in (-1, MAX_LEN):
        with pytest.raises(RuntimeError, match="position is out of range"):
            run(model, [5], torch.tensor([position]))
    with pytest.raises(RuntimeError, match="do not agree"):
        run(model, [5, 6], torch.tensor([0]))


def test_rows_that_are_not_finite_are_told(model, isa):
    """A weight of the table that is infinite spoils the rows of its sequence, and no other's."""
    logits, finite = run(model, [7, 8, 9], lens=[1, 2])
    assert finite.tolist() == [True] * 3
    assert bool(logits.isfinite().all())
    table = model.plan.model.embed
    assert table.format_name == "F32"
    ids_0_to_15 = table.data.view(torch.float32)[: 16 * table.columns].view(table.columns, 16)
    kept = ids_0_to_15[3, 8].clone()
    ids_0_to_15[3, 8] = float("inf")
    try:
        logits, finite = run(model, [7, 8, 9], lens=[1, 2])
    finally:
        ids_0_to_15[3, 8] = kept
    assert finite.tolist() == [True, False, False]
    assert finite.tolist() == logits.isfinite().all(-1).tolist()


@pytest.mark.parametrize("row", [0, 17, 319])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_bad_row_of_the_head_is_told(model, row, threads, isa):
    """Every thread looks at its own logits, to the last one."""
    head = model.plan.model.head.parts[0]
    assert head.format_name == "F32"
    weights = head.data.view(torch.float32).view(-1, head.columns, 16)
    weights[row // 16, 3, row % 16] = float("nan")
    model.num_threads = threads
    logits, finite = run(model, [7, 8], lens=[1, 1])
    assert finite.tolist() == [False, False]
    assert logits.isnan().sum() == 2


def test_indices_are_checked(model, isa):
    numbers = torch.arange(2)
    shape = (model.config.num_layers, 2, BLOCKS, BLOCK_SIZE, model.config.num_kv_heads, model.config.head_dim)
    good = {
        "slot_mapping": numbers,
        "block_tables": torch.tensor([[0]]),
        "query_start": torch.tensor([0, 2]),
        "context_lens": torch.tensor([2]),
    }
    bad = {
        "slot_mapping": torch.tensor([0, BLOCKS * BLOCK_SIZE]),
        "block_tables": torch.tensor([[BLOCKS]]),
        "query_start": torch.tensor([0, 1]),
        "context_lens": torch.tensor([BLOCK_SIZE + 1]),
    }
    for name, value in bad.items():
        inputs = AttentionInput(positions=numbers, max_context=2, **{**good, name: value})
        with pytest.raises(RuntimeError, match=r"out of range|do not hold"):
            model.step(numbers, inputs, torch.zeros(shape), numbers)
    with pytest.raises(RuntimeError, match="logit row"):
        model.step(numbers, AttentionInput(numbers, max_context=2, **good), torch.zeros(shape), numbers + 1)


def test_nothing_to_do(model):
    none = torch.zeros(0, dtype=torch.int64)
    shape = (model.config.num_layers, 2, 1, 16, model.config.num_kv_heads, model.config.head_dim)
    inputs = AttentionInput(none, none, none.view(0, 0), torch.tensor([0]), none, 0)
    logits, finite = model.step(none, inputs, torch.zeros(shape), none)
    assert logits.shape == (0, 320)
    assert finite.shape == (0,)
