"""Attention over the paged cache: float64's results for every cache format, the same bits in any company."""

import math
from dataclasses import dataclass, replace

import pytest
import torch

from flexjudge_fast.ops.kv_cache import quantize_kv, to_kv_rows
from flexjudge_fast.ops.paged_attention import packed_attention, paged_attention
from tests.kv_layout import kernel_order

FORMATS = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
}
HEADS = [(1, 1), (2, 1), (6, 2), (4, 1), (5, 1), (12, 2), (7, 1), (8, 1), (3, 3), (14, 1)]
HEAD_DIMS = [5, 16, 24, 40, 64, 80, 128]
BLOCK_SIZES = [1, 3, 16, 32, 48, 50]
CASES_PER_FORMAT = 80  # with the four formats, 320 for each instruction set


@dataclass(frozen=True)
class Case:
    """A step's attention: the plain cache in layer 1 of 2, and who reads what."""

    query: torch.Tensor  # [num_tokens, num_heads, head_dim] float32
    cache: torch.Tensor  # [2, 2, num_blocks, block_size, num_kv_heads, row_size]
    block_tables: torch.Tensor
    query_start: list[int]
    context_lens: list[int]
    scale: float

    def run(self, threads: int = 1) -> torch.Tensor:
        return packed_attention(
            self.query,
            kernel_order(self.cache),
            1,
            self.block_tables,
            self.query_start,
            self.context_lens,
            self.scale,
            threads,
        )

    def reference(self) -> torch.Tensor:
        """In float64, from what the cache holds."""
        return paged_attention(
            self.query.double(),
            self.cache[1],
            self.block_tables,
            torch.tensor(self.query_start),
            torch.tensor(self.context_lens),
            self.scale,
        )

    def only(self, i: int, skip: int = 0) -> "Case":
        """Sequence `i` by itself, all but the first `skip` of its new tokens."""
        start, end = self.query_start[i] + skip, self.query_start[i + 1]
        return replace(
            self,
            query=self.query[start:end].contiguous(),
            block_tables=self.block_tables[i : i + 1].contiguous(),
            query_start=[0, end - start],
            context_lens=[self.context_lens[i]],
        )


def draw(generator: torch.Generator, low: int, high: int) -> int:
    """A whole number from `low` to `high`."""
    return int(torch.randint(low, high + 1, (1,), generator=generator))


def pick(generator: torch.Generator, values: list):
    return values[draw(generator, 0, len(values) - 1)]


def random_case(generator: torch.Generator, dtype: torch.dtype, most: int = 1500, num_seqs: int = 0) -> Case:
    """Sequences at any stage: first chunk, chunk behind a cached prefix, decode. Unused slots hold NaN."""
    num_heads, num_kv_heads = pick(generator, HEADS)
    head_dim, block_size = pick(generator, HEAD_DIMS), pick(generator, BLOCK_SIZES)
    num_seqs = num_seqs or draw(generator, 1, 4)
    context_lens = [int(most ** float(torch.rand(1, generator=generator))) for _ in range(num_seqs)]
    new = [min(n, pick(generator, [1, 1, 2, draw(generator, 3, 30)])) for n in context_lens]
    query_start = [sum(new[:i]) for i in range(num_seqs + 1)]

    counts = [-(-n // block_size) for n in context_lens]
    num_blocks = sum(counts) + 2
    ids = torch.randperm(num_blocks, generator=generator)
    tables = torch.full((num_seqs, max(counts) + 1), 10**12)  # where it must not be read
    nothing = torch.full((2, 2, num_blocks, block_size, num_kv_heads, head_dim), torch.nan)
    cache = to_kv_rows(nothing, dtype)  # in int8, the scales are NaN
    slots = cache[1].flatten(1, 2)
    for i, (count, context_len) in enumerate(zip(counts, context_lens, strict=True)):
        tables[i, :count] = ids[sum(counts[:i]) :][:count]
        positions = torch.arange(context_len)
        where = tables[i, positions // block_size] * block_size + positions % block_size
        stored = random_kv(generator, context_len, num_kv_heads, head_dim)
        slots[:, where] = to_kv_rows(stored, dtype)
    query = torch.randn(query_start[-1], num_heads, head_dim, generator=generator)
    scale = pick(generator, [1.0, 3.0]) / math.sqrt(head_dim)
    return Case(query, cache, tables, query_start, context_lens, scale)


def random_kv(generator: torch.Generator, context_len: int, num_kv_heads: int, head_dim: int) -> torch.Tensor:
    """Keys and values [2, context_len, num_kv_heads, head_dim], tokens of very different sizes among them."""
    stored = torch.randn(2, context_len, num_kv_heads, head_dim, generator=generator)
    return stored * torch.rand(2, context_len, num_kv_heads, 1, generator=generator).exp2()


def worst_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest error of a head's output, relative to that output."""
    return float(((got - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


@pytest.mark.parametrize("dtype", FORMATS.values(), ids=FORMATS)
def test_against_float64(dtype, isa):
    generator = torch.Generator().manual_seed(1)
    for _ in range(CASES_PER_FORMAT):
        case = random_case(generator, dtype)
        got = case.run(threads=draw(generator, 1, 3))
        assert worst_error(got, case.reference()) <= 1e-5, case


@pytest.mark.parametrize("dtype", FORMATS.values(), ids=FORMATS)
def test_same_bits_in_any_company(dtype, isa):
    """Together, alone, the later half of a chunk by itself; with one thread and with more."""
    generator = torch.Generator().manual_seed(2)
    for _ in range(8):
        case = random_case(generator, dtype, num_seqs=3)
        together = case.run()
        assert all(torch.equal(case.run(threads), together) for threads in (2, 3))
        for i in range(3):
            expected = together[case.query_start[i] : case.query_start[i + 1]]
            half = len(expected) // 2
            for threads in (1, 2, 3):
                assert torch.equal(case.only(i).run(threads), expected)
                assert torch.equal(case.only(i, skip=half).run(threads), expected[half:])


def test_int8_against_what_was_stored(isa):
    """The error of the 8-bit codes: never beyond what half a step can do, and small on the whole."""
    generator = torch.Generator().manual_seed(3)
    errors = []
    for _ in range(100):
        exact = random_case(generator, torch.float32)
        expected = exact.reference()
        difference = replace(exact, cache=to_kv_rows(exact.cache, torch.int8)).run() - expected
        key_step, value_step = quantize_kv(exact.cache[1])[1].nan_to_num().flatten(1).amax(1)
        largest_value = exact.cache[1, 1].nan_to_num().abs().max()
        # Scores move by at most `moved`, so probabilities by a factor of at most exp(2 * moved).
        moved = exact.scale * exact.query.abs().sum(-1, keepdim=True) * key_step / 2
        bound = largest_value * (2 * moved).expm1() + value_step / 2
        assert (difference.abs() <= bound + 1e-5).all()
        errors += (difference.norm(dim=-1) / expected.norm(dim=-1)).flatten().tolist()
    assert sum(errors) / len(errors) <= 0.015  # measured: 0.0105
    assert max(errors) <= 0.12  # measured: 0.077


def test_wrong_shapes_are_refused(compiled):
    case = random_case(torch.Generator().manual_seed(4), torch.int8)
    for wrong in (
        replace(case, query=case.query[..., 1:].contiguous()),
        replace(case, query=case.query.double()),
        replace(case, cache=case.cache.to(torch.uint8)),
        replace(case, query_start=[*case.query_start, 0]),
    ):
        with pytest.raises(RuntimeError):
            wrong.run()
