"""Dense matrix products against float64, and their bits in any batch."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from flexjudge_fast.kernels.runs import plan_runs
from flexjudge_fast.ops.linear import linear, linear_reference
from tests.interpreted import SWEEP, add_in_order, in_nan

NUM_CASES = 200 * SWEEP
NUM_PARTS = 10
TOKENS = (0, 1, 2, 15, 16, 17, 33, 64, 65, 130)


@pytest.fixture
def in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    add_in_order(monkeypatch)


def _cases(part: int) -> Iterator[tuple[int, int, int, torch.dtype, bool, float, torch.Generator]]:
    for seed in range(part, NUM_CASES, NUM_PARTS):
        g = torch.Generator().manual_seed(seed)
        at = torch.randint(0, 1 << 30, (5,), generator=g).tolist()
        tokens = TOKENS[seed // NUM_PARTS % len(TOKENS)]
        rows, columns = (1, 3, 63, 64, 65, 129, 200)[at[0] % 7], (1, 16, 31, 32, 33, 64, 100, 256)[at[1] % 8]
        scale = (1e-4, 1.0, 1.0, 50.0)[at[2] % 4]
        dtype = (torch.float16, torch.float32)[at[3] % 2]
        yield tokens, rows, columns, dtype, at[4] % 2 == 0, scale, g


def _check(out: torch.Tensor, expected: torch.Tensor) -> None:
    """Within 1e-3 of each row's largest magnitude, and the rounding of a 16-bit result."""
    assert out.shape == expected.shape
    assert torch.isfinite(out).all()
    if out.numel():
        error = (out.double() - expected).abs().amax(1)
        assert (error <= 1e-3 * expected.abs().amax(1) + 1e-7).all()


@pytest.mark.parametrize("part", range(NUM_PARTS))
def test_matches_float64(part: int) -> None:
    for tokens, rows, columns, dtype, has_bias, scale, g in _cases(part):
        x = in_nan((torch.randn(tokens, columns, generator=g) * scale).to(dtype))
        weight = in_nan(torch.randn(rows, columns, generator=g).to(dtype))
        bias = in_nan(torch.randn(rows, generator=g).to(dtype)) if has_bias else None
        out = linear(x, weight, bias)
        assert out.dtype == dtype
        wide = None if bias is None else bias.double()
        _check(out, linear_reference(x.double(), weight.double(), wide))


def test_rows_that_are_not_contiguous() -> None:
    x = torch.randn(4, 100)[:, ::2]
    weight = torch.randn(9, 50)
    _check(linear(x, weight), x.double() @ weight.double().T)


@pytest.mark.parametrize("columns", [40, 256])
def test_a_token_has_the_same_bits_in_any_batch(in_order: None, columns: int) -> None:
    g = torch.Generator().manual_seed(1)
    x, weight = torch.randn(130, columns, generator=g), torch.randn(70, columns, generator=g)
    bias = torch.randn(70, generator=g)
    batch = linear(x, weight, bias)
    for count in (1, 2, 16, 17, 33, 65):
        assert torch.equal(linear(x[:count], weight, bias), batch[:count])
    assert torch.equal(linear(x[77:78], weight, bias), batch[77:78])


def test_runs_share_a_program_or_not_by_tokens_but_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("tiles", "runs"):
        monkeypatch.setattr(f"flexjudge_fast.kernels.{module}.capability", lambda: 90)
    plans = [plan_runs("linear", 3584, 18944, 2 * 3584 * 18944, tokens) for tokens in (1, 16, 64, 512)]
    assert {(plan.num_runs, plan.steps, plan.constants["BLOCK_K"]) for plan in plans} == {(4, 74, 64)}
    assert [plan.parallel for plan in plans] == [True, True, True, False]


def test_the_sum_starts_at_the_first_run(in_order: None) -> None:
    """Runs in the order first to last: huge values that cancel leave what comes after them."""
    weight = torch.zeros(64, 256)
    weight[:, 0], weight[:, 100], weight[:, 255] = 2.0**30, -(2.0**30), 1.0
    for tokens in (1, 130):
        assert (linear(torch.ones(tokens, 256), weight) == 1).all()
        backwards = linear(torch.ones(tokens, 256), weight.flip(1))
        assert (backwards == np.float32(1) + np.float32(-(2.0**30)) + np.float32(2.0**30)).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("part", range(NUM_PARTS))
def test_on_a_gpu_in_bfloat16(part: int) -> None:
    for tokens, rows, columns, _, has_bias, scale, g in _cases(part):
        x = in_nan((torch.randn(tokens, columns, generator=g) * scale).bfloat16(), "cuda")
        weight = in_nan(torch.randn(rows, columns, generator=g).bfloat16(), "cuda")
        bias = in_nan(torch.randn(rows, generator=g).bfloat16(), "cuda") if has_bias else None
        out = linear(x, weight, bias)
        wide = None if bias is None else bias.double()
        expected = linear_reference(x.double(), weight.double(), wide)
        if out.numel():
            error = (out.double() - expected).abs().amax(1)
            assert (error <= 5e-3 * expected.abs().amax(1) + 1e-6).all()  # bfloat16: 2^-9
        if tokens:
            assert torch.equal(linear(x[:1], weight, bias), out[:1])
