"""Sampling: truncations against a plain reference, the compiled op against the torch reference."""

import math
import random

import pytest
import torch

from flexjudge_fast.engine.random import uniforms
from flexjudge_fast.ops.sample import Draw, sample_reference, sample_tokens

OPTIONS = [{}, {"top_k": 7}, {"top_p": 0.6}, {"min_p": 0.2}, {"top_k": 290, "top_p": 0.9, "min_p": 0.01}]


def draw(row: int = 0, at: float = 0.0, temperature: float = 0.7, **options: float) -> Draw:
    values = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, **options}
    return Draw(row, int(values["top_k"]), temperature, values["top_p"], values["min_p"], at)


def reference_support(logits: torch.Tensor, wanted: Draw) -> set[int]:
    """What may be drawn, worked out one token at a time in float64."""
    order = sorted(range(len(logits)), key=lambda i: -float(logits[i]))
    weights = {i: math.exp((float(logits[i]) - float(logits.max())) / wanted.temperature) for i in order}
    kept = order[: wanted.top_k] if wanted.top_k else order
    mass, total, nucleus = 0.0, sum(weights[i] for i in kept), []
    for i in kept:
        if mass < wanted.top_p * total:
            nucleus.append(i)
        mass += weights[i]
    return {i for i in nucleus if weights[i] >= wanted.min_p * weights[nucleus[0]]}


@pytest.mark.parametrize("size", [5, 300, 2000])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("spread", [0.01, 1.0, 5.0])
def test_support(size, options, spread):
    logits = torch.randn(1, size, generator=torch.Generator().manual_seed(size)) * spread
    support = reference_support(logits[0], draw(**options))
    drawn = set(sample_tokens(logits, [draw(at=i / 997, **options) for i in range(997)], (), 2))
    assert drawn <= support
    if len(support) < 8 and spread <= 1:
        assert drawn == support


@pytest.mark.parametrize("size", [1, 17, 1000, 50_001])
@pytest.mark.parametrize("options", OPTIONS)
def test_compiled_equals_reference(size, options, isa):
    """Draws at the same point of the same distribution; a draw on the very edge of a token may differ."""
    generator = torch.Generator().manual_seed(size)
    logits = torch.randn(3, size, generator=generator) * 4
    banned = tuple(range(1, size, 5))
    shuffled = random.Random(size)
    draws = [draw(shuffled.randrange(3), shuffled.random(), **options) for _ in range(200)]
    draws += [draw(row, temperature=0.0) for row in range(3)]
    got = sample_tokens(logits, draws, banned, 2)
    differ = [
        (wanted, found)
        for wanted, found in zip(draws, got, strict=True)
        if found != sample_reference(logits[wanted.row], wanted, banned)
    ]
    for wanted, found in differ:
        near = {
            sample_reference(
                logits[wanted.row], draw(0, min(max(wanted.uniform + d, 0), 1), **options), banned
            )
            for d in (-1e-5, 1e-5)
        }
        assert wanted.temperature > 0 and found in near
    assert len(differ) <= 3
    assert not set(got) & set(banned)
    assert got == sample_tokens(logits, draws, banned, 1)


def test_ties_and_ends(isa):
    flat = torch.zeros(1, 700)
    assert sample_tokens(flat, [draw(temperature=0.0)], (), 1) == [0]
    assert sample_tokens(flat, [draw(temperature=0.0)], (0, 1), 1) == [2]
    assert sample_tokens(flat, [draw(at=i / 700 + 1e-4) for i in range(700)], (), 1) == list(range(700))
    assert sample_tokens(flat, [draw(at=1 - 2**-53), draw(at=0.0)], (), 1) == [699, 0]
    drawn = sample_tokens(flat, [draw(at=i / 50, top_k=3) for i in range(50)], (), 1)
    assert set(drawn) == {0, 1, 2}  # of equals, the first ids
    peak = flat.clone()
    peak[0, 650] = 1e4
    assert sample_tokens(peak, [draw(at=0.99, temperature=1e-3), draw(at=0.5)], (), 1) == [650, 650]


def test_frequencies(isa):
    logits = torch.tensor([[0.1, 0.4, 0.5]]).log()
    numbers = uniforms([(1, 2, 3, position) for position in range(20_000)])
    draws = [draw(at=number, temperature=1.0) for number in numbers]
    drawn = sample_tokens(logits, draws, (), 2)
    assert [round(drawn.count(i) / 20_000, 1) for i in range(3)] == [0.1, 0.4, 0.5]


def test_no_draws_and_bad_arguments(compiled):
    logits = torch.zeros(2, 10)
    assert sample_tokens(logits, [], (), 2) == []
    with pytest.raises(RuntimeError, match="banned id is out of range"):
        sample_tokens(logits, [draw()], (10,), 1)
    with pytest.raises(RuntimeError, match="a row is out of range"):
        sample_tokens(logits, [draw(2)], (), 1)
