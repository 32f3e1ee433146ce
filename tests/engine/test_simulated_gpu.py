"""The GPU engine over interpreted kernels: the tokens of plain torch, through graphs, forks and preemption.

`FLEXJUDGE_BACKEND=triton` has every op run its kernel, on the CPU's memory in Triton's interpreter; the
device is the fake one, which works as late as it may.
"""

from dataclasses import replace

import pytest
import torch

from flexjudge_fast import Engine, Judge, Judgement, SamplingParams
from flexjudge_fast.engine.attention_plans import make_planner
from flexjudge_fast.engine.config import EngineConfig
from flexjudge_fast.engine.gpu_runner import GpuRunner
from flexjudge_fast.engine.graph_ladder import GraphLadder
from flexjudge_fast.engine.input_buffers import InputBuffers
from flexjudge_fast.engine.scheduler import Scheduler
from flexjudge_fast.engine.setup import load_parts
from tests.engine.fake_device import FakeDevice
from tests.interpreted import patch_once
from tests.models import write_checkpoint

BLOCK = 16
GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
PROMPTS = ("hello", "a longer prompt than a block", "a")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("simulated")
    write_checkpoint(path, heads=(4, 2))
    return path


@pytest.fixture
def backend(monkeypatch):
    patch_once(monkeypatch)
    return lambda name: monkeypatch.setenv("FLEXJUDGE_BACKEND", name)


def load(folder, num_blocks=64, kv_dtype=torch.float32, max_len=128, quantization=None, **options):
    """An engine whose runner is the GPU's, over `FakeDevice`."""
    config = EngineConfig(
        kv_cache_memory=1 << 22, max_model_len=max_len, block_size=BLOCK, max_num_seqs=4, **options
    )
    parts = load_parts(folder, "cpu", "float32", quantization, (), config)
    model, width = parts.runner.model, max_len // BLOCK + 1
    sizes = (config.max_batched_tokens, 4, width, BLOCK, torch.device("cpu"), 1, model.config.vocab_size)
    runner = GpuRunner(
        model,
        kv_dtype,
        num_blocks,
        BLOCK,
        lambda: InputBuffers(*sizes),
        config.max_batched_tokens,
        FakeDevice(),
        make_planner("triton", model.config, torch.float32, kv_dtype, BLOCK),
        ladder=GraphLadder(4, width),
    )
    return Engine(replace(parts, runner=runner, scheduler=Scheduler(parts.scheduler.limits, num_blocks)))


def reference(folder, prompts, params, backend, **options):
    backend("reference")
    with Engine.from_pretrained(folder, kv_cache_memory=1 << 24, max_model_len=128, **options) as engine:
        return [(c.token_ids, c.finish_reason) for c in engine.generate(list(prompts), params)]


def simulated(engine, prompts, params):
    found = [(c.token_ids, c.finish_reason) for c in engine.generate(list(prompts), params)]
    engine.check_integrity()
    return found


@pytest.mark.parametrize("chunk", [11, 64])
def test_prefill_and_decode(folder, backend, chunk):
    wanted = reference(folder, PROMPTS, GREEDY, backend)
    backend("triton")
    with load(folder, max_batched_tokens=chunk) as engine:
        assert simulated(engine, PROMPTS, GREEDY) == wanted
        assert engine._stepper.num_ahead > 0 and engine._parts.runner.num_replays > 0
        assert simulated(engine, PROMPTS, GREEDY) == wanted  # from the prefix cache


def test_forks_share_their_prefix(folder, backend):
    """Sampled, with top-k and top-p: the kernel draws what the reference draws."""
    params = SamplingParams(temperature=1.0, top_k=20, top_p=0.9, n=3, max_tokens=3, seed=1)
    wanted = reference(folder, PROMPTS[:2], params, backend)
    backend("triton")
    with load(folder) as engine:
        assert simulated(engine, PROMPTS[:2], params) == wanted


def test_preemption(folder, backend):
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    prompts = ["first prompt", "second prompt", "third prompt"]
    wanted = reference(folder, prompts, params, backend)
    backend("triton")
    with load(folder, num_blocks=4) as engine:
        assert simulated(engine, prompts, params) == wanted
        assert engine.stats().num_preemptions > 0


@pytest.mark.parametrize("kv_dtype", [torch.int8, torch.float8_e4m3fn])
def test_eight_bit_cache(folder, backend, kv_dtype):
    """Near the float32 model's logits."""
    backend("reference")
    with Engine.from_pretrained(folder, kv_cache_memory=1 << 24, max_model_len=128) as engine:
        wanted = engine.logits("hello world")
    backend("triton")
    with load(folder, kv_dtype=kv_dtype) as engine:
        found = engine.logits("hello world")
    assert (found - wanted).abs().max() < 0.1 * wanted.abs().max()
    assert (found.argmax(-1) == wanted.argmax(-1)).float().mean() > 0.8


@pytest.mark.parametrize("quantization", ["int4"])
def test_four_bit_weights(folder, backend, quantization):
    wanted = reference(folder, PROMPTS[:1], GREEDY, backend, quantization=quantization)
    backend("triton")
    with load(folder, quantization=quantization) as engine:
        assert simulated(engine, PROMPTS[:1], GREEDY) == wanted


def test_a_judgement(folder, backend):
    """Forced tokens, a score's distribution and its probes."""
    params = {"max_think_tokens": 2, "max_tokens": 60, "temperature": 0.0}
    item = Judgement("score", "Q", ["A"], system="Judge.", **params)
    backend("reference")
    with Engine.from_pretrained(folder, kv_cache_memory=1 << 24, max_model_len=512) as engine:
        wanted = next(iter(Judge(engine).run([item])))
    backend("triton")
    with load(folder, num_blocks=100, max_len=512, max_batched_tokens=512) as engine:
        found = next(iter(Judge(engine).run([item])))
    assert found.scores == wanted.scores
    assert found.expected_scores == pytest.approx(wanted.expected_scores, rel=1e-4)
