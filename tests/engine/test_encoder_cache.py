"""The encoder cache in memory: LRU within its budget, and the folder behind it."""

from collections import OrderedDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexjudge_fast.engine.encoder_cache import EncoderCache
from flexjudge_fast.engine.encoder_store import EncoderStore

PLENTY = 1 << 20


def numbers(seed: int, num_tokens: int = 3):
    return torch.randn(num_tokens, 8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def store(tmp_path):
    return EncoderStore(tmp_path / "cache", PLENTY, b"model")


def test_least_recently_used_goes_first():
    item = numbers(0)
    cache = EncoderCache(2 * item.nbytes)
    cache.put(b"a", item)
    cache.put(b"b", numbers(1))
    assert cache.get(b"a") is not None
    cache.put(b"c", numbers(2))
    assert cache.get(b"b") is None
    assert torch.equal(cache.get(b"a"), item) and torch.equal(cache.get(b"c"), numbers(2))
    assert (cache.num_hits, cache.num_misses, cache.num_store_hits) == (3, 1, 0)
    assert len(cache) == 2 and cache.num_bytes == 2 * item.nbytes


def test_a_budget_of_nothing_keeps_nothing():
    cache = EncoderCache(0)
    cache.put(b"a", numbers(0))
    assert cache.get(b"a") is None and len(cache) == 0 and cache.num_bytes == 0


def test_what_exceeds_the_budget_evicts_nobody_and_goes_to_the_folder(store):
    small, large = numbers(0, 1), numbers(1, 9)
    cache = EncoderCache(small.nbytes, store)
    cache.put(b"small", small)
    cache.put(b"large", large)
    assert len(cache) == 1 and torch.equal(cache.get(b"small"), small)
    assert torch.equal(cache.get(b"large"), large)
    assert (cache.num_hits, cache.num_store_hits) == (1, 1)


def test_a_slice_does_not_keep_its_batch():
    batch = numbers(0, 100)
    cache = EncoderCache(PLENTY)
    cache.put(b"a", batch[10:12])
    assert torch.equal(cache.get(b"a"), batch[10:12])
    assert cache.num_bytes == batch[10:12].nbytes
    cache.check_integrity()


def test_a_hit_in_the_folder_comes_into_memory(store):
    store.put(b"a", numbers(0))
    cache = EncoderCache(PLENTY, store)
    first, second = cache.get(b"a"), cache.get(b"a")
    assert first is second and torch.equal(first, numbers(0))
    assert (cache.num_hits, cache.num_store_hits, cache.num_misses) == (1, 1, 0)


def test_drift_is_caught():
    cache = EncoderCache(PLENTY)
    cache.put(b"a", numbers(0))
    cache.num_bytes += 1
    with pytest.raises(AssertionError, match="counted"):
        cache.check_integrity()


OPERATIONS = st.lists(
    st.tuples(st.booleans(), st.integers(0, 5), st.integers(1, 6)),  # put or get, key, num_tokens
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(OPERATIONS, st.integers(0, 12))
def test_memory_against_a_model(operations, budget_tokens):
    token = 8 * 4  # bytes of a token's embedding
    cache = EncoderCache(budget_tokens * token)
    model: OrderedDict[int, torch.Tensor] = OrderedDict()
    for seed, (is_put, key, num_tokens) in enumerate(operations):
        if is_put:
            item = numbers(seed, num_tokens)
            cache.put(bytes([key]), item)
            model.pop(key, None)
            if num_tokens <= budget_tokens:
                model[key] = item
            while sum(len(kept) for kept in model.values()) > budget_tokens:
                model.popitem(last=False)
        elif key in model:
            model.move_to_end(key)
            assert torch.equal(cache.get(bytes([key])), model[key])
        else:
            assert cache.get(bytes([key])) is None
        assert len(cache) == len(model)
        cache.check_integrity()
