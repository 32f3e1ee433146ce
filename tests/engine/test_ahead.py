"""One step ahead of a device gives what plain steps give, whatever is asked and whatever goes wrong."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from flexjudge_fast import Engine, Judge, Judgement, SamplingParams
from flexjudge_fast.engine.attention_plans import NoPlanner
from flexjudge_fast.engine.config import EngineConfig
from flexjudge_fast.engine.engine import EngineInput
from flexjudge_fast.engine.gpu_runner import GpuRunner
from flexjudge_fast.engine.graph_ladder import GraphLadder
from flexjudge_fast.engine.input_buffers import InputBuffers
from flexjudge_fast.engine.model_runner import ModelRunner
from flexjudge_fast.engine.scheduler import Scheduler
from flexjudge_fast.engine.setup import load_parts
from tests.engine.fake_device import FakeDevice, HashModel
from tests.models import write_checkpoint
from tests.test_judge_media import plain

BLOCK = 4
WORDS = ("", "hello", "hello world", "hello there", "a" * 13, "b" * 40, "the quick brown fox")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("ahead")
    write_checkpoint(path)
    return path


def make_engine(folder, ahead, num_blocks=200, bad_share=0.0, max_len=256, eager=False, **limits):
    """An engine over `HashModel`, with plain steps or one step ahead of a device."""
    config = EngineConfig(
        kv_cache_memory=1 << 22, max_model_len=max_len, block_size=BLOCK, max_num_seqs=6, **limits
    )
    parts = load_parts(folder, "cpu", "float32", None, (), config)
    decoder, width = parts.runner.model.config, max_len // BLOCK + 1
    sizes = (config.max_batched_tokens, 6, width, BLOCK, torch.device("cpu"), 1, decoder.vocab_size)
    model, common = HashModel(decoder, bad_share), (torch.float32, num_blocks, BLOCK)
    if ahead:
        rows, ladder = config.max_batched_tokens, GraphLadder(6, width)
        runner = GpuRunner(
            model, *common, lambda: InputBuffers(*sizes), rows, FakeDevice(eager), NoPlanner(), ladder=ladder
        )
    else:
        runner = ModelRunner(model, *common, InputBuffers(*sizes), torch.device("cpu"))
    scheduler = Scheduler(parts.scheduler.limits, num_blocks)
    return Engine(replace(parts, runner=runner, scheduler=scheduler))


def random_params(rng):
    """Everything that may end or change a request, in some mixture."""
    return SamplingParams(
        temperature=float(rng.choice([0.0, 0.7, 1.5])),
        top_k=int(rng.choice([0, 0, 5])),
        top_p=float(rng.choice([1.0, 0.8])),
        seed=int(rng.integers(3)),
        n=int(rng.choice([1, 1, 1, 2, 3])),
        max_tokens=int(rng.integers(1, 40)),
        stop=("a", "zz") if rng.random() < 0.2 else (),
        stop_token_ids=tuple(rng.integers(0, 256, 4).tolist()) if rng.random() < 0.3 else (),
        ignore_eos=bool(rng.random() < 0.2),
        logprobs=2 if rng.random() < 0.15 else None,
    )


def outcome(output):
    """What an input came to, without times and without what the prefix cache held at that moment."""
    if output.error is not None:
        return str(output.error)
    return [(c.token_ids, c.text, c.finish_reason, c.logprobs) for c in output.completions]


@pytest.mark.parametrize("seed", range(40))
def test_the_same_as_plain_steps(folder, seed):
    """Small pools preempt; some contexts give NaN; sequences come and go."""
    rng = np.random.default_rng(seed)
    prompts = [str(rng.choice(WORDS)) + str(rng.choice(WORDS)) + "x" for _ in range(int(rng.integers(1, 16)))]
    asked = [(prompt, random_params(rng)) for prompt in prompts]
    options = {
        "num_blocks": int(rng.choice([80, 100, 200])),
        "bad_share": float(rng.choice([0.0, 0.01])),
        "prefix_caching": bool(rng.random() < 0.8),
        "max_batched_tokens": int(rng.choice([7, 64])),
        "eager": seed % 2 == 1,
    }
    found = []
    for ahead in (False, True):
        with make_engine(folder, ahead, **options) as engine:
            inputs = [EngineInput(engine.encode(prompt), params) for prompt, params in asked]
            outputs = sorted(engine.run(inputs), key=lambda output: output.index)
            found.append([outcome(output) for output in outputs])
            engine.check_integrity()
    assert found[0] == found[1]


def test_most_steps_are_launched_ahead_and_replayed(folder):
    with make_engine(folder, True) as engine:
        engine.generate(["hello", "there"], SamplingParams(max_tokens=50, ignore_eos=True))
        runner = engine._parts.runner
        assert engine._stepper.num_ahead >= 48
        assert runner.num_replays >= 48


@pytest.mark.parametrize("seed", range(12))
def test_judgements(folder, seed):
    """Reasoning that ends by itself or is closed, forced answers, probes of scores, votes, both orders."""
    rng = np.random.default_rng(seed)
    kinds = {"score": 1, "pair": 2, "rank": 3, "choice": 2}
    items = [
        Judgement(
            kind,
            f"Question {rng.integers(5)}",
            [f"Answer {i}" * int(rng.integers(1, 3)) for i in range(kinds[kind])],
            votes=int(rng.integers(1, 4)),
            order=str(rng.choice(["fixed", "both"])),
            max_think_tokens=int(rng.choice([0, 3, 20])),
            max_tokens=120,
            temperature=float(rng.choice([0.0, 1.0])),
            scale=(1, 10) if rng.random() < 0.5 else (1.0, 5.0),
        )
        for kind in rng.choice(list(kinds), 6)
    ]
    found = []
    for ahead in (False, True):
        with make_engine(folder, ahead, num_blocks=4000, max_len=2048, eager=seed % 2 == 1) as engine:
            found.append([plain(v) for v in sorted(Judge(engine).run(items), key=lambda v: v.index)])
            engine.check_integrity()
    assert found[0] == found[1]
    assert {v["finish_reason"] for v in found[0]} == {"answer"}


def test_cancelled_requests_leave_nothing_behind(folder):
    """A caller that goes away while its step is under way; the others' tokens stay right."""
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    wanted = make_engine(folder, False).generate(["hello", "there"], params)
    with make_engine(folder, True) as engine:
        inputs = [EngineInput(engine.encode(w), params) for w in ("hello", "gone", "there")]
        short = EngineInput(engine.encode("short"), SamplingParams(max_tokens=3, ignore_eos=True))
        first = engine.run([short, *inputs])
        assert next(first).index == 0  # three others are under way
        first.close()
        found = engine.generate(["hello", "there"], params)
        assert [c.token_ids for c in found] == [c.token_ids for c in wanted]
        engine.check_integrity()
        assert engine.stats().num_used_blocks == 0


def test_a_device_that_fails_is_tried_again(folder):
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    wanted = make_engine(folder, False).generate(["hello"], params)[0].token_ids
    with make_engine(folder, True) as engine:
        model, calls = engine._parts.runner.model, []
        step = model.step

        def fails_once(*given):
            calls.append(given)
            if len(calls) == 9:
                raise RuntimeError("the device is lost")
            return step(*given)

        model.step = fails_once
        with pytest.raises(RuntimeError, match="the device is lost"):
            engine.generate(["hello"], params)
        assert engine.generate(["hello"], params)[0].token_ids == wanted
        engine.check_integrity()
