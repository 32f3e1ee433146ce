"""Rotary embedding and cache writes against float64, for every kind of cache; unused slots stay."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch

from flexjudge_fast.ops.kv_cache import quantize_kv
from flexjudge_fast.ops.rotary_embedding import rotary_embedding
from flexjudge_fast.ops.rotary_kv import RotaryAngles, rotary_kv
from tests.interpreted import SWEEP, in_nan, rows_close

NUM_CASES = 200 * SWEEP
NUM_PARTS = 5
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
CODES = (torch.int8, torch.float8_e4m3fn)
MAX_LEN = 50


@dataclass(frozen=True)
class Case:
    """One call; slots of -1 are padding, every other slot is there once."""

    qkv: torch.Tensor
    angles: RotaryAngles
    slots: torch.Tensor
    num_kv_heads: int
    block_size: int
    num_blocks: int
    cache_dtype: torch.dtype

    def to(self, dtype: torch.dtype, device: str = "cpu") -> "Case":
        angles = replace(
            self.angles,
            cos=in_nan(self.angles.cos, device),
            sin=in_nan(self.angles.sin, device),
            positions=self.angles.positions.to(device),
            dtype=dtype,
        )
        return replace(
            self, qkv=in_nan(self.qkv.to(dtype), device), angles=angles, slots=self.slots.to(device)
        )

    def run(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries, and the cache, whose bytes were all ones."""
        head_dim = self.qkv.shape[2]
        row_size = head_dim + 4 * (self.cache_dtype in CODES)
        shape = (2, self.num_blocks, self.block_size, self.num_kv_heads, row_size * self.cache_dtype.itemsize)
        cache = torch.full(shape, 255, dtype=torch.uint8, device=self.qkv.device).view(self.cache_dtype)
        return rotary_kv(self.qkv, self.angles, cache, self.slots), cache

    def expected(self) -> tuple[torch.Tensor, torch.Tensor]:
        """In float64: queries; keys and values [2, num_tokens, num_kv_heads, head_dim]."""
        cos, sin = (table.double() for table in replace(self.angles, dtype=torch.float64).cos_sin)
        qkv = self.qkv.double()
        query, key, value = qkv.tensor_split((-2 * self.num_kv_heads, -self.num_kv_heads), dim=1)
        return rotary_embedding(query, cos, sin), torch.stack((rotary_embedding(key, cos, sin), value))

    def split(self, cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """8-bit blocks: codes [2, num_slots, num_kv_heads, head_dim], scales [2, num_slots, num_kv_heads]."""
        head_dim, rows = self.qkv.shape[2], self.block_size * self.num_kv_heads
        flat = cache.view(torch.uint8).view(2, self.num_blocks, -1)
        codes = flat[..., : rows * head_dim].contiguous().view(self.cache_dtype)
        scales = flat[..., rows * head_dim :].contiguous().view(torch.float32)
        heads = (2, self.num_blocks * self.block_size, self.num_kv_heads)
        return codes.view(*heads, head_dim), scales.view(heads)


def _cases(part: int) -> Iterator[Case]:
    for seed in range(part, NUM_CASES, NUM_PARTS):
        g = torch.Generator().manual_seed(seed)

        def pick(*options: int, g: torch.Generator = g) -> int:
            return options[int(torch.randint(len(options), (1,), generator=g))]

        tokens, head_dim, num_kv_heads = pick(0, 1, 2, 5), pick(4, 16, 20, 64, 80, 128), pick(1, 2, 4, 9)
        num_heads, block_size = num_kv_heads * pick(1, 3), pick(1, 4, 16)
        num_blocks = -(-tokens // block_size) + 2
        half = head_dim // 2
        angles = torch.outer(torch.arange(MAX_LEN), torch.rand(half, generator=g))
        sections: tuple[int, ...] = ()
        if seed % 3 == 0:
            first = pick(*range(1, half))
            sections = (first, pick(*range(half - first + 1)), 0)
            sections = (*sections[:2], half - sum(sections))
        rows = (3, tokens) if sections else (tokens,)
        positions = torch.randint(MAX_LEN, rows, generator=g)
        slots = torch.randperm(num_blocks * block_size, generator=g)[:tokens]
        slots[torch.rand(tokens, generator=g) < 0.1] = -1
        qkv = torch.randn(tokens, num_heads + 2 * num_kv_heads, head_dim, generator=g) * 10.0 ** pick(
            -2, 0, 1
        )
        qkv[torch.rand(qkv.shape[:2], generator=g) < 0.05] = 0
        cache_dtype = (*FLOATS, *CODES)[seed // NUM_PARTS % 5]
        yield Case(
            qkv,
            RotaryAngles(angles.cos(), angles.sin(), positions, sections, torch.float32),
            slots,
            num_kv_heads,
            block_size,
            num_blocks,
            cache_dtype,
        ).to((torch.float32, torch.float16)[seed // (5 * NUM_PARTS) % 2])


def _check(case: Case, bar: float) -> None:
    query, cache = case.run()
    expected, stored = case.expected()
    assert query.dtype == case.qkv.dtype
    assert rows_close(query, expected, bar)
    used = case.slots[case.slots >= 0]
    stored = stored[:, case.slots >= 0]
    unused = torch.ones(case.num_blocks * case.block_size, dtype=torch.bool, device=used.device)
    unused[used] = False
    if case.cache_dtype in CODES:
        codes, scales = case.split(cache)
        assert (codes[:, unused].view(torch.uint8) == 255).all()
        assert scales[:, unused].isnan().all()
        assert rows_close(scales[:, used], stored.abs().amax(-1) / _limit(case), bar)
        got = codes[:, used].double() * scales[:, used, :, None]
        # half a step of int8; half of the last of e4m3's 3 bits, or of its least step
        step = scales[:, used, :, None].double()
        allowed = 0.501 * step if case.cache_dtype == torch.int8 else stored.abs() / 15.9 + step / 1000
        assert ((got - stored).abs() <= allowed + bar * stored.abs().amax(-1, keepdim=True)).all()
    else:
        rows = cache.flatten(1, 2)
        untouched = rows[:, unused].contiguous().view(torch.uint8)
        assert (untouched == 255).all()
        precise = case.cache_dtype == torch.float32 or case.cache_dtype == case.qkv.dtype == torch.float16
        assert rows_close(rows[:, used], stored, bar if precise else max(bar, 8e-3))


def _limit(case: Case) -> float:
    return 127.0 if case.cache_dtype == torch.int8 else 448.0


@pytest.mark.parametrize("part", range(NUM_PARTS))
def test_matches_float64(part: int) -> None:
    for case in _cases(part):
        _check(case, 1e-3)


@pytest.mark.parametrize("part", range(NUM_PARTS))
def test_codes_are_those_of_quantize_kv(part: int) -> None:
    """To the bit, from values that need no rotation; a negative zero counts as zero."""
    for case in (case for case in _cases(part) if case.cache_dtype in CODES):
        codes, scales = case.split(case.run()[1])
        used = case.slots >= 0
        values = case.qkv[:, -case.num_kv_heads :][used]
        expected, expected_scales = quantize_kv(values, case.cache_dtype)
        assert torch.equal(codes[1, case.slots[used]].float(), expected.float())
        assert torch.equal(scales[1, case.slots[used]], expected_scales.squeeze(-1))


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_rows_that_are_not_finite(dtype: torch.dtype, bad: float) -> None:
    case = next(case for case in _cases(0) if case.qkv.shape[0] == 5 and case.num_kv_heads == 4)
    qkv, slots = case.qkv.clone(), torch.arange(5)
    qkv[3, -1, -1] = bad
    case = replace(case, qkv=qkv, slots=slots, cache_dtype=dtype)
    codes, scales = case.split(case.run()[1])
    expected, expected_scales = quantize_kv(qkv[:, -4:], dtype)
    assert scales[1, 3, 3].isnan()
    assert torch.equal(codes[1, :5].float(), expected.float())
    torch.testing.assert_close(scales[1, :5], expected_scales.squeeze(-1), rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("part", range(NUM_PARTS))
def test_on_a_gpu_in_bfloat16(part: int) -> None:
    for case in _cases(part):
        _check(case.to(torch.bfloat16, "cuda"), 8e-3)
