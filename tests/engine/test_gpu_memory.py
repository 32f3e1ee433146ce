"""The KV cache's share of a GPU's memory."""

import pytest

from flexjudge_fast.engine.gpu_memory import GpuMemory, graph_bytes
from flexjudge_fast.engine.graph_ladder import GraphLadder
from flexjudge_fast.errors import InvalidArgumentError

GIB = 1 << 30


def test_what_a_step_needs_is_left() -> None:
    memory = GpuMemory(total=80 * GIB, free=64 * GIB, step=3 * GIB, encoder=1 * GIB, graphs=1 * GIB)
    assert memory.kv_cache(1.0) == 60 * GIB
    assert memory.kv_cache(0.5) == 30 * GIB


def test_the_larger_of_step_and_encoder_counts() -> None:
    memory = GpuMemory(total=80 * GIB, free=64 * GIB, step=1 * GIB, encoder=4 * GIB, graphs=0)
    assert memory.kv_cache(1.0) == 60 * GIB


@pytest.mark.parametrize("free", [0, 2 * GIB, 4 * GIB])
def test_nothing_left_names_every_term(free: int) -> None:
    memory = GpuMemory(total=24 * GIB, free=free, step=3 * GIB, encoder=2 * GIB, graphs=1 * GIB)
    with pytest.raises(InvalidArgumentError) as caught:
        memory.kv_cache(0.9)
    for part in ("24.00 GiB in all", f"{free / GIB:.2f} GiB free", "3.00 GiB", "2.00 GiB", "1.00 GiB"):
        assert part in str(caught.value)
    for name in ("max_batched_tokens", "max_encoder_patches", "max_num_seqs"):
        assert name in str(caught.value)


def test_graphs_keep_logits_once() -> None:
    """However many are recorded: a longer ladder with the same top costs launches alone."""
    few, many = GraphLadder(64, 32), GraphLadder(64, 2049)
    assert graph_bytes(many, 152064) - graph_bytes(few, 152064) == graph_bytes(many, 0) - graph_bytes(few, 0)
    assert graph_bytes(few, 152064) - graph_bytes(few, 0) >= 64 * 152064 * (4 + 2)
    assert graph_bytes(many, 0) / (len(many.num_seqs) * len(many.table_widths)) >= 1 << 20
