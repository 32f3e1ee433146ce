"""Sampling: the truncations against a plain reference, and draws that depend on their key alone."""

import math

import numpy as np
import pytest
import torch

from flexjudge_fast import InvalidArgumentError, SamplingParams
from flexjudge_fast.engine.random import philox4x32, uniforms
from flexjudge_fast.engine.sampler import draw_of, log_probs, sample_among, top_log_probs
from flexjudge_fast.ops.sample import Draw


def test_parameters_become_a_draw():
    params = SamplingParams(temperature=0.5, top_k=3, top_p=0.9, min_p=0.1)
    assert draw_of(params, 4, 0.25) == Draw(4, 3, 0.5, 0.9, 0.1, 0.25)


def test_sample_among():
    logits = torch.tensor([[9.0, 9.0, 9.0, 9.0], [3.0, 2.0, 1.0, 0.0]])
    assert sample_among(logits, draw_of(SamplingParams(temperature=0), 1, 0), [2, 3]) == 2
    drawn = {sample_among(logits, draw_of(SamplingParams(), 1, i / 50), [1, 3]) for i in range(50)}
    assert drawn == {1, 3}


def test_log_probs():
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0))
    want = logits.double().log_softmax(-1)
    assert log_probs(logits, [3, 4]) == pytest.approx(want[[3, 4]].tolist(), abs=1e-5)
    top = top_log_probs(logits, int(logits.argmin()), 3)
    assert len(top) == 4


def test_philox_known_answers():
    """The vectors of the Random123 distribution (kat_vectors, philox4x32 10)."""
    ones = 0xFFFFFFFF
    counters = [(0,) * 4, (ones,) * 4, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)]
    keys = [(0, 0), (ones, ones), (0xA4093822, 0x299F31D0)]
    one_by_one = [list(philox4x32(c, k)) for c, k in zip(counters, keys, strict=True)]
    found = philox4x32(tuple(np.array(counters, dtype=np.uint64).T), tuple(np.array(keys, dtype=np.uint64).T))
    assert np.stack(found).T.tolist() == one_by_one
    assert one_by_one == [
        [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8],
        [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ]


def test_draws_differ_in_every_coordinate():
    base = (5, 6, 7, 2**32 - 2)
    others = [tuple(v + (i == k) for i, v in enumerate(base)) for k in range(4)]
    draws = uniforms([base, *others, (2**64 - 1, 2**64 - 1, 0, 0)])
    assert len(set(draws)) == 6
    assert all(0 <= d < 1 for d in draws)
    assert uniforms([base]) == draws[:1] and uniforms([]) == []
    many = [(5, 2**64 - 1 - i, i % 3, i) for i in range(100)]
    assert uniforms(many) == [number for draw in many for number in uniforms([draw])]


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
