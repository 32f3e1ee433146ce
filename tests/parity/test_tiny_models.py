"""The same logits and greedy tokens as transformers on tiny random checkpoints, however work is cut up."""

import random

import pytest
import torch

from flexjudge_fast import Engine, SamplingParams
from flexjudge_fast.engine.engine import EngineInput
from flexjudge_fast.prompts.segments import Prompt
from tests.models import VOCAB, greedy, write_checkpoint

CASES = {
    "llama": {},
    "llama-tied": {"tied": True},
    "llama-bias": {"bias": True},
    "llama-mha": {"heads": (4, 4)},
    "llama-mqa": {"heads": (6, 1)},
    "llama-linear": {"rope": "linear"},
    "llama-llama3": {"rope": "llama3"},
    "llama-yarn": {"rope": "yarn"},
    "llama-sharded": {"shard": "100KB"},
    "qwen2": {"family": "qwen2"},
    "qwen2-tied": {"family": "qwen2", "tied": True, "heads": (6, 2)},
    "qwen2-yarn": {"family": "qwen2", "rope": "yarn"},
}
GREEDY = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(VOCAB) for _ in range(rng.randrange(1, 70))] for _ in range(count)]


@pytest.mark.parametrize("name", CASES)
def test_logits_and_batch(name, tmp_path):
    model = write_checkpoint(tmp_path, **CASES[name])
    engine = Engine.from_pretrained(tmp_path, kv_cache_memory="64MiB")
    batch = prompts(16)
    for prompt in batch[:4]:
        with torch.inference_mode():
            expected = model(torch.tensor([prompt])).logits[0]
        assert (engine.logits(prompt) - expected).abs().max() < 1e-4
    want = [greedy(model, prompt, 64) for prompt in batch]
    assert list(engine.generate([batch[0]], GREEDY)[0].token_ids) == want[0]
    assert [list(c.token_ids) for c in engine.generate(batch, GREEDY)] == want
    warm = engine.generate(batch, GREEDY)
    assert [list(c.token_ids) for c in warm] == want
    assert all(
        c.num_cached_tokens == len(c.prompt_token_ids) - 1 for c in warm if len(c.prompt_token_ids) > 1
    )
    engine.check_integrity()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    return folder, write_checkpoint(folder, "qwen2", heads=(4, 2))


@pytest.mark.parametrize("chunk", [*range(1, 20), 31, 64, 127])
def test_every_chunk_size(tiny, chunk):
    folder, model = tiny
    batch = prompts(3, seed=1)
    params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
    engine = Engine.from_pretrained(folder, kv_cache_memory="64MiB", max_batched_tokens=chunk)
    assert [list(c.token_ids) for c in engine.generate(batch, params)] == [
        greedy(model, p, 64) for p in batch
    ]
    with torch.inference_mode():
        expected = model(torch.tensor([batch[2]])).logits[0]
    assert (engine.logits(batch[2]) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_after_preemption(tiny, block_size):
    folder, model = tiny
    batch = prompts(8, seed=2)
    token_bytes = 2 * 3 * 2 * 16 * 4
    tight = (max(map(len, batch)) + 64 + 40) // block_size * block_size * token_bytes
    engine = Engine.from_pretrained(folder, kv_cache_memory=tight, block_size=block_size)
    assert [list(c.token_ids) for c in engine.generate(batch, GREEDY)] == [
        greedy(model, p, 64) for p in batch
    ]
    assert engine.stats().num_preemptions > 0
    engine.check_integrity()


def test_logits_after_preemption(tiny):
    """Requests for all logits push each other out while in chunks; none gives a row twice."""
    folder, model = tiny
    batch = [p * 3 for p in prompts(6, seed=6)]
    tight = (max(map(len, batch)) + 32) * 2 * 3 * 2 * 16 * 4
    engine = Engine.from_pretrained(
        folder, kv_cache_memory=tight, max_batched_tokens=48, prefix_caching=False
    )
    inputs = [EngineInput(Prompt(tuple(p)), SamplingParams(max_tokens=1), all_logits=True) for p in batch]
    outputs = {o.index: o.logits for o in engine.run(inputs)}
    for i, prompt in enumerate(batch):
        with torch.inference_mode():
            expected = model(torch.tensor([prompt])).logits[0]
        assert outputs[i].shape == expected.shape
        assert (outputs[i] - expected).abs().max() < 1e-4
    engine.check_integrity()


def test_after_fork(tiny):
    folder, model = tiny
    engine = Engine.from_pretrained(folder, kv_cache_memory="64MiB")
    prompt = prompts(5, seed=3)[4]
    params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True, n=5)
    samples = engine.generate([prompt], params)
    assert [list(c.token_ids) for c in samples] == [greedy(model, prompt, 64)] * 5
    assert engine.stats().num_forward_tokens == len(prompt) + 5 * 63
    engine.check_integrity()


def test_partial_block_is_shared(tiny):
    """A second prompt recomputes only what lies behind the first difference, inside a block too."""
    folder, model = tiny
    engine = Engine.from_pretrained(folder, kv_cache_memory="64MiB")
    first = prompts(1, seed=4)[0] + list(range(60))
    second = [*first[:41], *[(t + 1) % VOCAB for t in first[41:]]]
    short = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    outputs = engine.generate([first, second], short)
    assert outputs[1].num_cached_tokens == 41
    assert [list(c.token_ids) for c in outputs] == [greedy(model, p, 8) for p in (first, second)]
    assert list(engine.generate([first], short)[0].token_ids) == greedy(model, first, 8)


def test_bfloat16_is_close(tiny):
    folder, model = tiny
    engine = Engine.from_pretrained(folder, dtype="bfloat16", kv_cache_memory="64MiB")
    prompt = prompts(1, seed=5)[0] + list(range(40))
    with torch.inference_mode():
        expected = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
    got = engine.logits(prompt).log_softmax(-1)
    assert (expected.exp() * (expected - got)).sum(-1).mean() < 1e-2
