"""A million random operations on the block pool: nothing leaks, nothing drifts."""

import random

import pytest

from flexjudge_fast.engine.block_pool import BlockPool
from flexjudge_fast.engine.prefix_cache import ROOT, BlockContent, PrefixCache

NUM_BLOCKS = 64


def content(block_id: int, rng: random.Random) -> BlockContent:
    return BlockContent(ROOT, (block_id, rng.randrange(50)))


@pytest.mark.slow
def test_a_million_operations():
    rng = random.Random(0)
    cache = PrefixCache()
    pool = BlockPool(NUM_BLOCKS, cache)
    tables: list[list[int]] = []
    for step in range(1_000_000):
        choice = rng.random() if len(tables) < 24 else 1.0  # many owners: give some back
        if choice < 0.35 and pool.num_free:
            tables.append([pool.allocate()])
        elif choice < 0.5 and tables and pool.num_free:
            rng.choice(tables).append(pool.allocate())
        elif choice < 0.6 and tables:
            table = list(rng.choice(tables))
            pool.share(table)
            tables.append(table)
        elif choice < 0.7 and tables:
            block_id = rng.choice(rng.choice(tables))
            item = content(block_id, rng)
            cache.insert(block_id, item.digest(), item)
        elif choice < 0.8 and len(cache):
            block_id = rng.choice(list(cache._contents))
            pool.share([block_id])
            tables.append([block_id])
        elif tables:
            index = rng.randrange(len(tables))
            tables[index], tables[-1] = tables[-1], tables[index]
            pool.release(tables.pop())
        assert pool.num_free + pool.num_used == NUM_BLOCKS
        if step % 1000 == 0:
            pool.check_integrity(tables)
            assert pool.num_used == len({block_id for table in tables for block_id in table})
    for table in tables:
        pool.release(table)
    pool.check_integrity([])
    assert pool.num_free == NUM_BLOCKS


def test_double_release_is_caught():
    pool = BlockPool(4, PrefixCache())
    block_id = pool.allocate()
    pool.release([block_id])
    with pytest.raises(AssertionError, match="more often"):
        pool.release([block_id])


def test_drift_is_caught():
    pool = BlockPool(4, PrefixCache())
    block_id = pool.allocate()
    with pytest.raises(AssertionError, match="drifted"):
        pool.check_integrity([[block_id, block_id]])


def test_cached_blocks_are_reused_last_and_oldest_first():
    cache = PrefixCache()
    pool = BlockPool(3, cache)
    first, second = pool.allocate(), pool.allocate()
    for block_id in (first, second):
        item = BlockContent(ROOT, (block_id,))
        cache.insert(block_id, item.digest(), item)
    pool.release([first])
    pool.release([second])
    assert [pool.allocate() for _ in range(3)] == [2, first, second]
    assert len(cache) == 0


def test_a_digest_collision_is_no_hit():
    cache = PrefixCache()
    real = BlockContent(ROOT, (1, 2, 3))
    cache.insert(0, real.digest(), real)
    other = BlockContent(ROOT, (4, 5, 6))
    assert cache.find(real.digest(), real) == 0
    assert cache.find(real.digest(), other) is None  # equal digest, other content


def test_media_keys_tell_blocks_apart():
    plain, media = BlockContent(ROOT, (1, 2)), BlockContent(ROOT, (1, 2), (b"image",))
    other = BlockContent(ROOT, (1, 2), (b"other",))
    assert len({plain.digest(), media.digest(), other.digest()}) == 3
    cache = PrefixCache()
    cache.insert(0, media.digest(), media)
    assert cache.longest_start(ROOT, (1, 2), (b"other",)) == (None, 0)
    assert cache.longest_start(ROOT, (1, 2), (b"image",)) == (0, 2)
