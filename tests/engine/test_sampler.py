"""Sampling: the truncations against a plain reference, and draws that depend on their key alone."""

import math

import pytest
import torch

from flexjudge_fast import InvalidArgumentError, SamplingParams
from flexjudge_fast.engine.random import philox4x32, uniform
from flexjudge_fast.engine.sampler import log_probs, sample_token, top_log_probs


def reference_support(logits: torch.Tensor, params: SamplingParams) -> set[int]:
    """What may be drawn, worked out one token at a time in float64."""
    order = sorted(range(len(logits)), key=lambda i: -float(logits[i]))
    weights = {i: math.exp((float(logits[i]) - float(logits.max())) / params.temperature) for i in order}
    kept = order[: params.top_k] if params.top_k else order
    mass, total, nucleus = 0.0, sum(weights[i] for i in kept), []
    for i in kept:
        if mass < params.top_p * total:
            nucleus.append(i)
        mass += weights[i]
    return {i for i in nucleus if weights[i] >= params.min_p * weights[nucleus[0]]}


@pytest.mark.parametrize("size", [5, 300, 2000])
@pytest.mark.parametrize(
    "options",
    [{}, {"top_k": 7}, {"top_p": 0.6}, {"min_p": 0.2}, {"top_k": 290, "top_p": 0.9, "min_p": 0.01}],
)
@pytest.mark.parametrize("spread", [0.01, 1.0, 5.0])
def test_support(size, options, spread):
    logits = torch.randn(size, generator=torch.Generator().manual_seed(size)) * spread
    params = SamplingParams(temperature=0.7, **options)
    support = reference_support(logits, params)
    drawn = {sample_token(logits, params, i / 997) for i in range(997)}
    assert drawn <= support
    if len(support) < 8 and spread <= 1:
        assert drawn == support


def test_frequencies():
    logits = torch.tensor([0.1, 0.4, 0.5]).log()
    counts = [0, 0, 0]
    for position in range(20_000):
        counts[sample_token(logits, SamplingParams(), uniform(1, 2, 3, position))] += 1
    assert [round(c / 20_000, 1) for c in counts] == [0.1, 0.4, 0.5]


def test_greedy_allowed_and_banned():
    logits = torch.tensor([3.0, 2.0, 1.0, 0.0])
    greedy = SamplingParams(temperature=0)
    assert sample_token(logits, greedy, 0) == 0
    assert sample_token(logits, greedy, 0, allowed=[2, 3]) == 2
    assert sample_token(logits, greedy, 0, banned=[0, 1]) == 2
    assert {sample_token(logits, SamplingParams(), i / 50, allowed=[1, 3]) for i in range(50)} == {1, 3}


def test_log_probs():
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0))
    want = logits.double().log_softmax(-1)
    assert log_probs(logits, [3, 4]) == pytest.approx(want[[3, 4]].tolist(), abs=1e-5)
    top = top_log_probs(logits, int(logits.argmin()), 3)
    assert len(top) == 4


def test_philox_known_answers():
    """The vectors of the Random123 distribution (kat_vectors, philox4x32 10)."""
    assert philox4x32((0, 0, 0, 0), (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    ones = 0xFFFFFFFF
    assert philox4x32((ones,) * 4, (ones,) * 2) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert philox4x32(pi, (0xA4093822, 0x299F31D0)) == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)


def test_draws_differ_in_every_coordinate():
    base = (5, 6, 7, 8)
    draws = {uniform(*base)} | {uniform(*(v + (i == k) for i, v in enumerate(base))) for k in range(4)}
    assert len(draws) == 5
    assert all(0 <= d < 1 for d in draws)


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1},
        {"temperature": math.nan},
        {"top_p": 0},
        {"top_p": 1.5},
        {"min_p": 2},
        {"top_k": -1},
        {"n": 0},
        {"max_tokens": 0},
        {"seed": -1},
        {"stop": ("",)},
        {"logprobs": 1000},
    ],
)
def test_bad_parameters(bad):
    with pytest.raises(InvalidArgumentError, match=next(iter(bad))):
        SamplingParams(**bad)
