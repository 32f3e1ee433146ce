"""Ragged steps of attention over a paged cache, with NaN wherever nothing may be read."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from flexjudge_fast.kernels.attention_sizes import Sizes, attention_sizes
from flexjudge_fast.ops.attention_plan import HostPlan, plan_attention
from flexjudge_fast.ops.kv_cache import from_kv_rows, to_kv_rows, to_split_blocks
from flexjudge_fast.ops.paged_attention import paged_attention, paged_attention_reference
from tests.interpreted import in_nan

CACHES = {
    "float32": (torch.float32, torch.float32),
    "float16": (torch.float16, torch.float16),
    "int8": (torch.int8, torch.float16),
    "fp8": (torch.float8_e4m3fn, torch.float16),
    "int8 for float32": (torch.int8, torch.float32),
    "fp8 for float32": (torch.float8_e4m3fn, torch.float32),
}
GROUPS = (1, 2, 3, 5, 7, 8, 14)
HEAD_DIMS = (8, 16, 24, 40, 64, 80, 128)
BLOCK_SIZES = (1, 3, 16, 32)


@dataclass(frozen=True)
class Case:
    """A step over the plain cache, and who reads what."""

    query: torch.Tensor  # [num_tokens, num_heads, head_dim]
    cache: torch.Tensor  # [2, num_blocks, block_size, num_kv_heads, row_size]
    block_tables: torch.Tensor  # [num_seqs, max_blocks]
    new: tuple[int, ...]
    context_lens: tuple[int, ...]

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.query.shape[2])

    @property
    def starts(self) -> torch.Tensor:
        return torch.tensor([0, *self.new]).cumsum(0)

    @property
    def sizes(self) -> Sizes:
        block_size, kv_heads = self.cache.shape[2:4]
        heads, head_dim = self.query.shape[1:]
        return attention_sizes(self.query.dtype, self.cache.dtype, block_size, heads, kv_heads, head_dim)

    def plan(self, shared: bool = True, max_items: int | None = None) -> HostPlan:
        """shared: with the tiles for shared prefixes."""
        sizes = self.sizes
        return plan_attention(
            self.starts.numpy(),
            torch.tensor(self.context_lens).numpy(),
            self.block_tables.numpy(),
            self.cache.shape[2],
            sizes.shared_cut if shared else sizes.cut,
            max_items,
        )

    def run(self, plan: HostPlan | None = None, device: str = "cpu") -> torch.Tensor:
        """By the kernels."""
        cache = to_split_blocks(self.cache) if self.cache.dtype.itemsize == 1 else self.cache
        lens = torch.tensor(self.context_lens)
        inputs = (cache, self.block_tables, self.starts, lens)
        return paged_attention(
            in_nan(self.query, device),
            *(x.to(device) for x in inputs),
            self.scale,
            (plan or self.plan()).to(device),
        )

    def expected(self) -> torch.Tensor:
        """In float64."""
        lens = torch.tensor(self.context_lens)
        query = self.query.double()
        return paged_attention_reference(query, self.cache, self.block_tables, self.starts, lens, self.scale)

    def magnitude(self) -> torch.Tensor:
        """In float64, the same average of the values' magnitudes; where values cancel, it is the larger."""
        rows = from_kv_rows(self.cache, torch.float32)
        return replace(self, cache=torch.stack((rows[0], rows[1].abs()))).expected()

    def error(self, out: torch.Tensor, bar: float) -> float:
        """`worst_error`; beyond `bar`, relative to what was averaged, as probabilities have 16 bits, too."""
        expected = self.expected()
        error = worst_error(out, expected)
        if error > bar and self.query.dtype.itemsize == 2:
            error = worst_error(out, expected, self.magnitude())
        return error

    def only(self, i: int, first: int = 0, last: int | None = None) -> "Case":
        """Sequence `i` by itself, its new tokens from `first` to `last`."""
        last = self.new[i] if last is None else last
        start = int(self.starts[i])
        return replace(
            self,
            query=self.query[start + first : start + last],
            block_tables=self.block_tables[i : i + 1],
            new=(last - first,),
            context_lens=(self.context_lens[i] - self.new[i] + last,),
        )


def make_case(
    g: torch.Generator,
    new: Sequence[int],
    context_lens: Sequence[int],
    cache: str,
    group: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    shared: Sequence[tuple[int, int]] = (),
) -> Case:
    """shared: per sequence, an earlier one and how many of its first blocks it has in common with it."""
    dtype, query_dtype = CACHES[cache]
    counts = [-(-n // block_size) for n in context_lens]
    num_blocks = sum(counts) + 2
    ids = torch.randperm(num_blocks, generator=g)
    tables = torch.full((len(new), max(counts) + 2), 10**12)  # where it must not be read
    nan = torch.full((2, num_blocks, block_size, kv_heads, head_dim), torch.nan)
    rows = to_kv_rows(nan, dtype)
    if dtype == torch.float8_e4m3fn:
        rows = torch.full_like(rows.view(torch.uint8), 0x7F).view(dtype)
        rows.view(torch.uint8)[..., -4:] = 0xFF
    elements = rows.view(torch.uint8) if dtype.itemsize == 1 else rows
    slots = elements.flatten(1, 2)
    for i, (count, context_len) in enumerate(zip(counts, context_lens, strict=True)):
        tables[i, :count] = ids[sum(counts[:i]) :][:count]
        parent, common = shared[i] if 0 < i < len(shared) else (0, 0)
        common = min(common, count, context_lens[parent] // block_size)
        tables[i, :common] = tables[parent, :common]
        positions = torch.arange(min(common * block_size, context_len), context_len)
        where = tables[i, positions // block_size] * block_size + positions % block_size
        if not len(positions):
            continue
        stored = torch.randn(2, len(positions), kv_heads, head_dim, generator=g)
        stored *= torch.rand(2, len(positions), kv_heads, 1, generator=g).exp2()
        written = to_kv_rows(stored, dtype)
        slots[:, where] = written.view(torch.uint8) if dtype.itemsize == 1 else written
    query = torch.randn(sum(new), group * kv_heads, head_dim, generator=g).to(query_dtype)
    return Case(query, rows, tables, tuple(new), tuple(context_lens))


def worst_error(got: torch.Tensor, expected: torch.Tensor, scale: torch.Tensor | None = None) -> float:
    """The largest error of a (token, head) row, relative to the row's largest magnitude in `scale`, which is
    `expected` if left out."""
    if not expected.numel():
        return 0.0
    largest = (expected if scale is None else scale).abs().amax(-1).clamp(min=1e-30)
    error = (got.double().cpu() - expected).abs().amax(-1) / largest
    return float(error.nan_to_num(nan=torch.inf).max())
