"""Decode, plain and with shared prefixes: against float64, its bits in any company, the bytes it loads."""

import dataclasses

import numpy as np
import pytest
import torch

from flexjudge_fast.kernels.catalog import ModelShape
from flexjudge_fast.kernels.catalog_attention import block_tables, decode_bytes, launches, plan_step
from flexjudge_fast.ops.kv_cache import to_split_blocks
from flexjudge_fast.ops.paged_attention import paged_attention
from tests.attention_cases import BLOCK_SIZES, CACHES, GROUPS, HEAD_DIMS, Case, make_case
from tests.interpreted import SWEEP, add_in_order, count_loads

NUM_CASES = 200 * SWEEP
NUM_PARTS = 10
CONTEXTS = (1, 2, 16, 31, 50, 64, 65, 100, 255, 256, 257)


def _case(seed: int, caches: tuple[str, ...] = tuple(CACHES)) -> Case:
    """Decoded sequences; in every second case all begin like the first, or like the one before them."""
    g = torch.Generator().manual_seed(seed)

    def pick(values: tuple[int, ...]) -> int:
        return values[int(torch.randint(len(values), (1,), generator=g))]

    shares = seed % 2 == 0
    num_seqs = pick((2, 2, 3, 3, 4, 9)) if shares else pick((1, 2, 3))
    context_lens = [pick(CONTEXTS) for _ in range(num_seqs)]
    shared = []
    if shares:
        context_lens = [256 + pick((0, 1, 3, 40)) for _ in range(num_seqs)]
        if seed % 20 == 4:
            context_lens = [513, 600, *context_lens][:num_seqs]
        shared = [(pick((0, 0, max(0, i - 1))), pick((100, 256, 600))) for i in range(num_seqs)]
    return make_case(
        g,
        [1] * num_seqs,
        context_lens,
        caches[seed // 2 % len(caches)],
        GROUPS[seed // 3 % len(GROUPS)],
        pick((1, 1, 1, 2)),
        HEAD_DIMS[seed // 5 % len(HEAD_DIMS)],
        pick(BLOCK_SIZES),
        shared,
    )


@pytest.mark.parametrize("part", range(NUM_PARTS))
def test_against_float64(part):
    for seed in range(part, NUM_CASES, NUM_PARTS):
        case = _case(seed)
        limit = 1e-3 if case.query.dtype == torch.float16 else 1e-5
        out = case.run(case.plan(shared=seed // 2 % 3 > 0))
        assert case.error(out, limit) <= limit, seed


@pytest.mark.parametrize("cache", CACHES)
def test_same_bits_with_and_without_sharing(cache, monkeypatch):
    """Alone, in a batch, in tiles of either size, and in lists with padding."""
    add_in_order(monkeypatch)
    g = torch.Generator().manual_seed(1)
    context_lens = (300, 513, 256, 520, 70, 290)
    case = make_case(g, [1] * 6, context_lens, cache, 5, 1, 24, 16, [(0, 64)] * 4 + [(0, 0), (0, 64)])
    together = case.run()
    assert max(case.plan().items[:, 1]) == 5 and max(case.plan(shared=False).items[:, 1]) == 3
    assert torch.equal(case.run(case.plan(shared=False)), together)
    assert torch.equal(case.run(case.plan(max_items=16)), together)
    for i in range(6):
        assert torch.equal(case.only(i).run(), together[i : i + 1])


def test_an_empty_context_gives_zeros():
    case = make_case(torch.Generator().manual_seed(2), (1, 1, 0), (0, 20, 0), "float32", 2, 1, 16, 16)
    out = case.run(case.plan(max_items=4))
    assert not out[0].any() and out[1].any()
    alone = case.only(0)
    assert not alone.run().any()


@pytest.mark.parametrize("cache", ["float16", "int8", "fp8"])
@pytest.mark.parametrize("shares", [False, True])
def test_loads_are_those_of_the_catalog(cache, shares, monkeypatch):
    """Counted in the interpreter: keys, values and scales once for each group of sequences."""
    g = torch.Generator().manual_seed(3)
    context_lens = (300, 513, 256, 520)
    case = make_case(g, [1] * 4, context_lens, cache, 7, 2, 32, 16, [(0, 64)] * 4 if shares else [])
    shape = ModelShape(
        num_heads=14, num_kv_heads=2, head_dim=32, dtype=torch.float16, kv_dtype=case.cache.dtype
    )
    plan, lens = case.plan(), torch.tensor(context_lens)
    stored = to_split_blocks(case.cache) if case.cache.dtype.itemsize == 1 else case.cache
    counts = count_loads(monkeypatch, {"cache": stored.view(torch.uint8), "query": case.query})
    paged_attention(case.query, stored, case.block_tables, case.starts, lens, case.scale, plan.to("cpu"))
    expected = decode_bytes(shape, plan)
    assert {name: counts[name] for name in ("cache", "query")} == {n: expected[n] for n in ("cache", "query")}
    read_once = sum(context_lens) - (3 * 256 if shares else 0)  # the first chunk, by four
    assert counts["cache"] == 2 * read_once * 2 * case.cache.shape[-1] * case.cache.element_size()


@pytest.mark.parametrize(("kv_dtype", "bar"), [(torch.bfloat16, 1.05), (torch.int8, 1.08)])
def test_excess_of_bytes(kv_dtype, bar):
    """The decode of a 7B judge with its merge, beside the least; docs/gpu.md says what bounds 8 bits."""
    shape = ModelShape(kv_dtype=kv_dtype)
    launch = next(launch for launch in launches(shape) if launch.case.startswith("decode 2048, "))
    step = np.arange(17), np.full(16, 2048), block_tables([2048] * 16, 0, 16)
    assert launch.moved_bytes == sum(decode_bytes(shape, plan_step(shape, *step, False)).values())
    assert launch.moved_bytes / launch.num_bytes <= bar


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("part", range(NUM_PARTS))
def test_bfloat16_on_the_device(part):
    for seed in range(part, NUM_CASES, NUM_PARTS):
        case = _case(seed, ("float16", "int8", "fp8"))
        cache = case.cache if case.cache.dtype.itemsize == 1 else case.cache.bfloat16()
        case = dataclasses.replace(case, query=case.query.bfloat16(), cache=cache)
        assert case.error(case.run(device="cuda"), 1e-2) <= 1e-2, seed
