"""Work lists of attention: every chunk of every sequence once, groups that truly share, fixed lengths."""

import numpy as np
import pytest

from flexjudge_fast.ops.attention_plan import Cut, HostPlan, plan_attention

CHUNK = 256
ONE = Cut(1, CHUNK, 16, 16)  # head


def _random_step(rng, num_seqs: int, block_size: int):
    """Sequences of which many begin like another one; garbage past their contexts."""
    new = rng.choice([0, 1, 1, 1, 2, 9, 40], num_seqs)
    lens = np.maximum(new, rng.choice([0, 1, 255, 256, 257, 513, 800, 1024], num_seqs))
    counts = -(-lens // block_size)
    tables = rng.integers(-(10**12), 10**12, (num_seqs, counts.max() + 2))
    for i in range(num_seqs):
        tables[i, : counts[i]] = 1000 * i + np.arange(counts[i])
        if i and rng.random() < 0.7:
            parent = rng.integers(i)
            common = min(counts[i], lens[parent] // block_size, rng.integers(0, counts.max() + 1))
            tables[i, :common] = tables[parent, :common]
    return np.append(0, np.cumsum(new)), lens, tables


def _check_decode(plan: HostPlan, starts, lens, tables, block_size: int) -> None:
    decoded = np.flatnonzero(np.diff(starts) == 1)
    wanted = {(i, chunk) for i in decoded for chunk in range(-(-lens[i] // plan.cut.chunk))}
    seen, places = {}, set()
    for first, count, chunk, _ in plan.items:
        members = plan.order[first : first + count]
        assert count * plan.cut.group <= plan.cut.decode_rows
        for seq, token, context_len, place in members:
            assert (seq, chunk) not in seen and token == starts[seq] and context_len == lens[seq]
            seen[seq, chunk] = place
            places.add(place)
        if count > 1:
            first, last = chunk * plan.cut.chunk, (chunk + 1) * plan.cut.chunk
            assert all(last <= lens[seq] for seq in members[:, 0])
            begin, end = first // block_size, -(-last // block_size)
            assert (tables[members[:, 0], begin:end] == tables[members[0, 0], begin:end]).all()
    assert set(seen) == wanted and len(places) == len(wanted)
    assert len(plan.merges) == (len(lens) if len(decoded) else 0)
    for i, (token, first, count, _) in enumerate(plan.merges):
        assert token == (starts[i] if i in decoded else -1)
        if token >= 0:
            assert [seen[i, chunk] for chunk in range(count)] == list(range(first, first + count))


def _check_prefill(plan: HostPlan, starts, lens) -> None:
    tokens = []
    for seq, first, count, sees in plan.tiles:
        assert count and count * plan.cut.group <= plan.cut.prefill_rows
        assert sees == lens[seq] - (starts[seq + 1] - first) + 1
        assert starts[seq] <= first and first + count <= starts[seq + 1]
        tokens += range(first, first + count)
    several = np.repeat(np.diff(starts) > 1, np.diff(starts))
    assert sorted(tokens) == np.flatnonzero(several).tolist()


@pytest.mark.parametrize("block_size", [1, 3, 16, 32, 48, 512])
def test_everything_once(block_size):
    rng = np.random.default_rng(block_size)
    for _ in range(50):
        starts, lens, tables = _random_step(rng, rng.integers(1, 20), block_size)
        group = rng.choice([1, 2, 7])
        cut = Cut(group, rng.choice([256, 512]), 16, 64)
        plan = plan_attention(starts, lens, tables, block_size, cut)
        _check_decode(plan, starts, lens, tables, block_size)
        _check_prefill(plan, starts, lens)


def test_forks_are_read_once():
    """16 sequences with 1792 of 2048 positions in common: 7 chunks for all, and one of each."""
    tables = np.arange(16 * 128).reshape(16, 128)
    tables[:, :112] = np.arange(112)

    def items(rows: int) -> np.ndarray:
        cut = Cut(7, CHUNK, rows, 64)
        return plan_attention(np.arange(17), np.full(16, 2048), tables, 16, cut).items

    assert np.bincount(items(128)[:, 1]).nonzero()[0].tolist() == [1, 16]
    assert len(items(128)) == 7 + 16
    assert len(items(64)) == 7 * 2 + 16  # 9 sequences a tile
    assert len(items(7)) == 8 * 16


def test_chunks_in_the_middle_may_be_shared():
    """What comes before a chunk does not matter to it."""
    tables = np.arange(4 * 48).reshape(4, 48)
    tables[:, 16:32] = 7
    plan = plan_attention(np.arange(5), np.full(4, 768), tables, 16, ONE)
    assert sorted(plan.items[:, 1].tolist()) == [1] * 8 + [4]


def test_fixed_lengths_and_overwriting():
    tables = np.arange(4 * 48).reshape(4, 48)
    plan = plan_attention(np.arange(5), np.array([768, 1, 0, 256]), tables, 16, ONE, max_items=12)
    assert plan.lengths == (12, 12, 4, 0)
    assert not plan.items[5:].any()
    on_device = plan.to("cpu")
    other = plan_attention(np.array([0, 1, 2, 2, 2]), np.array([700, 300, 0, 0]), tables, 16, ONE, 12)
    on_device.copy_(other)
    assert (on_device.items.numpy() == other.items).all() and (on_device.merges.numpy() == other.merges).all()
    with pytest.raises(ValueError, match="length"):
        on_device.copy_(plan_attention(np.arange(5), np.full(4, 1), tables, 16, ONE))
    with pytest.raises(ValueError, match="max_items"):
        plan_attention(np.arange(5), np.full(4, 768), tables, 16, ONE, max_items=11)
    with pytest.raises(ValueError, match="cannot hold"):
        plan_attention(np.arange(5), np.full(4, 768), tables, 16, Cut(32, CHUNK, 16, 64))


def test_nothing_to_do():
    none = np.zeros(0, np.int64)
    plan = plan_attention(np.zeros(1, np.int64), none, none.reshape(0, 0), 16, ONE)
    assert plan.lengths == (0, 0, 0, 0)
