"""Attention inside segments against float64, with and without rotation; a segment's bits in any company."""

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch

from flexjudge_fast.ops.rotary_embedding import rotary_embedding
from flexjudge_fast.ops.segment_attention import Segments, segment_attention, segment_attention_reference
from tests.interpreted import SWEEP, add_in_order, in_nan

NUM_CASES = 200 * SWEEP
NUM_PARTS = 10
Case = tuple[torch.Tensor, Segments, tuple[torch.Tensor, torch.Tensor] | None]


def _case(g: torch.Generator, sizes: list[int], heads: int, head_dim: int, scale: float, turns: bool) -> Case:
    """Tokens before and behind all segments are NaN."""
    margin, tokens = 2, sum(sizes)
    qkv = torch.full((tokens + 2 * margin, 3, heads, head_dim), torch.nan)
    qkv[margin : margin + tokens] = torch.randn(tokens, 3, heads, head_dim, generator=g)
    qkv[:, :2] *= scale
    angles = torch.rand(len(qkv), head_dim // 2, generator=g) * 6
    angles[:margin] = angles[margin + tokens :] = torch.nan
    start = margin + torch.tensor([0, *sizes]).cumsum(0)
    return qkv, Segments.at(start, torch.device("cpu")), (angles.cos(), angles.sin()) if turns else None


def _cases(part: int) -> Iterator[Case]:
    for seed in range(part, NUM_CASES, NUM_PARTS):
        g = torch.Generator().manual_seed(seed)

        def pick(*options: int, g: torch.Generator = g) -> int:
            return options[int(torch.randint(len(options), (1,), generator=g))]

        sizes = [pick(0, 1, 2, 16, 31, 32, 33, 64, 70) for _ in range(pick(0, 1, 1, 2, 3))]
        head_dim = (80, 64, 16, 128, 8, 72, 96, 20)[seed // 3 % 8] if seed % 3 else 80
        qkv, segments, cos_sin = _case(
            g, sizes, pick(1, 1, 1, 3), head_dim, (1.0, 3.0)[seed % 2], seed % 4 > 0
        )
        yield qkv.to((torch.float16, torch.float32)[seed // NUM_PARTS % 2]), segments, cos_sin


def _turned(qkv: torch.Tensor, cos_sin: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
    """Queries and keys as the op has them: turned in float32, and rounded to the dtype."""
    if cos_sin is None:
        return qkv
    turned = [rotary_embedding(qkv[:, i].float(), *cos_sin).to(qkv.dtype) for i in range(2)]
    return torch.stack((*turned, qkv[:, 2]), dim=1)


def _check(case: Case, bar: float) -> None:
    qkv, segments, cos_sin = case
    out = segment_attention(*case)
    expected = segment_attention_reference(_turned(qkv, cos_sin).double(), segments)
    begin, end = segments.start[0], segments.start[-1]
    assert out.shape == expected.shape
    assert out.dtype == qkv.dtype
    error = (out.double() - expected)[begin:end].abs()
    assert (error <= bar * expected[begin:end].abs().amax(-1, keepdim=True) + 1e-7).all()


@pytest.mark.parametrize("part", range(NUM_PARTS))
def test_matches_float64(part: int) -> None:
    for qkv, segments, cos_sin in _cases(part):
        _check((in_nan(qkv), segments, cos_sin), 1e-3)


def _check_company(device: torch.device, dtype: torch.dtype) -> None:
    """Long segments beside short ones bring other tiles, and another launch that turns."""
    sizes = [5, 64, 1, 0, 130, 33, 32]
    qkv, segments, cos_sin = _case(torch.Generator().manual_seed(1), sizes, 2, 80, 1.0, True)
    assert cos_sin is not None
    qkv, cos, sin = qkv.to(device, dtype), cos_sin[0].to(device), cos_sin[1].to(device)
    out = segment_attention(qkv, Segments.at(segments.start, device), (cos, sin))
    for begin, end in pairwise(segments.start.tolist()):
        alone = Segments.at(torch.tensor([0, end - begin]), device)
        expected = segment_attention(qkv[begin:end], alone, (cos[begin:end], sin[begin:end]))
        assert torch.equal(expected, out[begin:end])


def test_a_segment_has_the_same_bits_in_any_company(monkeypatch: pytest.MonkeyPatch) -> None:
    add_in_order(monkeypatch)
    _check_company(torch.device("cpu"), torch.float16)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_segment_has_the_same_bits_on_a_gpu(dtype: torch.dtype) -> None:
    _check_company(torch.device("cuda"), dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("part", range(NUM_PARTS))
def test_on_a_gpu_in_bfloat16(part: int) -> None:
    cuda = torch.device("cuda")
    for qkv, segments, cos_sin in _cases(part):
        angles = None if cos_sin is None else (in_nan(cos_sin[0], "cuda"), in_nan(cos_sin[1], "cuda"))
        _check((in_nan(qkv.bfloat16(), "cuda"), Segments.at(segments.start, cuda), angles), 2e-2)
