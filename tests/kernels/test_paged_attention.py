"""Prefill over a paged cache against float64, and its bits: alone, in a batch, in chunks, token by token."""

import dataclasses

import pytest
import torch

from tests.attention_cases import BLOCK_SIZES, CACHES, GROUPS, HEAD_DIMS, Case, make_case
from tests.interpreted import SWEEP, add_in_order

NUM_CASES = 200 * SWEEP
NUM_PARTS = 10
CACHED = (0, 0, 1, 3, 17, 31, 50, 63, 64, 65, 100, 120, 255, 256, 257)
NEW = (1, 1, 2, 3, 7, 9, 15, 33)


def _case(seed: int, caches: tuple[str, ...] = tuple(CACHES)) -> Case:
    """Prefill from the start and behind a cached prefix, beside decoded sequences and idle ones."""
    g = torch.Generator().manual_seed(seed)

    def pick(values: tuple[int, ...]) -> int:
        return values[int(torch.randint(len(values), (1,), generator=g))]

    num_seqs = 1 + seed % 3
    new = [pick(NEW) for _ in range(num_seqs)]
    if seed % 7 == 3:
        new[0] = 0
    context_lens = [pick(CACHED) + n for n in new]
    if seed % 50 == 5:
        context_lens[0] = 513
    return make_case(
        g,
        new,
        context_lens,
        caches[seed % len(caches)],
        GROUPS[seed // 3 % len(GROUPS)],
        pick((1, 1, 1, 2)),
        HEAD_DIMS[seed // 5 % len(HEAD_DIMS)],
        pick(BLOCK_SIZES),
    )


@pytest.mark.parametrize("part", range(NUM_PARTS))
def test_against_float64(part):
    for seed in range(part, NUM_CASES, NUM_PARTS):
        case = _case(seed)
        limit = 1e-3 if case.query.dtype == torch.float16 else 1e-5
        assert case.error(case.run(), limit) <= limit, seed


@pytest.mark.parametrize("cache", CACHES)
def test_same_bits_alone_in_a_batch_and_in_chunks(cache, monkeypatch):
    """However a sequence's tokens are cut into steps: all at once, in two, one by one (which is decode)."""
    add_in_order(monkeypatch)
    g = torch.Generator().manual_seed(1)
    case = make_case(g, (5, 1, 6), (258, 300, 20), cache, 3, 1, 24, 16)
    together = case.run()
    for i, start in enumerate(case.starts[:-1].tolist()):
        expected = together[start : start + case.new[i]]
        assert torch.equal(case.only(i).run(), expected)
        for j in range(case.new[i]):
            assert torch.equal(case.only(i, j, j + 1).run(), expected[j : j + 1])
        half = case.new[i] // 2
        assert torch.equal(case.only(i, half).run(), expected[half:])


def test_rows_that_see_nothing_are_zeros():
    case = make_case(torch.Generator().manual_seed(2), (4, 1, 2), (40, 1, 2), "float32", 2, 1, 16, 16)
    out = dataclasses.replace(case, context_lens=(2, 0, 2)).run()
    assert not out[:2].any() and out[2:4].any() and not out[4].any() and out[5:].any()


def test_nan_among_the_keys_comes_out():
    """A code of NaN in a float8 cache, and a NaN scale: nothing hides them."""
    for place in (0, -1):
        case = make_case(torch.Generator().manual_seed(3), (2, 2), (20, 20), "fp8", 1, 1, 16, 16)
        block, slot = int(case.block_tables[0, 0]), 3
        case.cache.view(torch.uint8)[1, block, slot, 0, place] = 0xFF
        if place:
            case.cache.view(torch.uint8)[1, block, slot, 0, -4:] = 0xFF
        out = case.run()
        assert out[:2, :, 0].isnan().all() and out[2:].isfinite().all()


def test_what_no_kernel_is_for_is_refused():
    case = make_case(torch.Generator().manual_seed(4), (2, 1), (20, 20), "float32", 2, 1, 16, 16)
    plan = case.plan()
    for wrong in ({"decode_rows": 8}, {"prefill_rows": 8}, {"group": 1}, {"chunk": 64}):
        with pytest.raises(ValueError, match="the plan is for"):
            case.run(dataclasses.replace(plan, cut=dataclasses.replace(plan.cut, **wrong)))
    with pytest.raises(ValueError, match="head_dim 12"):
        dataclasses.replace(case, query=case.query[..., :12]).run(plan)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("part", range(NUM_PARTS))
def test_bfloat16_on_the_device(part):
    for seed in range(part, NUM_CASES, NUM_PARTS):
        case = _case(seed, ("float16", "int8", "fp8"))
        cache = case.cache if case.cache.dtype.itemsize == 1 else case.cache.bfloat16()
        case = dataclasses.replace(case, query=case.query.bfloat16(), cache=cache)
        assert case.error(case.run(device="cuda"), 1e-2) <= 1e-2, seed
