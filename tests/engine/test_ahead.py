"""One step ahead of a device gives what plain steps give, whatever is asked and whatever goes wrong."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from flexjudge_fast import Engine, Judge, Judgement, Response, SamplingParams
from flexjudge_fast.engine.ahead import _Flight
from flexjudge_fast.engine.attention_plans import NoPlanner
from flexjudge_fast.engine.batch import Batch, Chunk
from flexjudge_fast.engine.config import EngineConfig
from flexjudge_fast.engine.engine import EngineInput, _Run
from flexjudge_fast.engine.gpu_runner import GpuRunner
from flexjudge_fast.engine.graph_ladder import GraphLadder
from flexjudge_fast.engine.input_buffers import InputBuffers
from flexjudge_fast.engine.model_runner import ModelRunner
from flexjudge_fast.engine.request import Request
from flexjudge_fast.engine.scheduler import Scheduler
from flexjudge_fast.engine.setup import load_parts
from tests.engine.fake_device import FakeDevice, HashModel
from tests.models import write_checkpoint, write_vision_checkpoint
from tests.test_judge_media import clip, picture, plain

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
    sections = len(decoder.rope.sections) or 1
    sizes = (config.max_batched_tokens, 6, width, BLOCK, torch.device("cpu"), sections, decoder.vocab_size)
    model, encoder = HashModel(decoder, bad_share), parts.runner.encoder
    common = (model, torch.float32, num_blocks, BLOCK)
    if ahead:
        rows, ladder = config.max_batched_tokens, GraphLadder(6, width)
        device = FakeDevice(eager)
        runner = GpuRunner(
            *common, lambda: InputBuffers(*sizes), rows, device, NoPlanner(), encoder, ladder=ladder
        )
    else:
        runner = ModelRunner(*common, InputBuffers(*sizes), torch.device("cpu"), encoder)
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


def count_steps(engine):
    """How many steps there are from here on, in a list of one."""
    count, step = [0], engine._stepper.step

    def counting():
        count[0] += 1
        step()

    engine._stepper.step = counting
    return count


def test_most_steps_are_launched_ahead_and_replayed(folder):
    with make_engine(folder, True) as engine:
        engine.generate(["hello", "there"], SamplingParams(max_tokens=50, ignore_eos=True))
        runner = engine._parts.runner
        assert engine._stepper.num_ahead >= 48
        assert runner.num_replays >= 48


def test_who_comes_and_goes_does_not_hold_up_the_others(folder):
    """Prompts in chunks, forks, and choices of the host beside those that just go on."""
    params = [
        SamplingParams(
            n=1 + (i % 5 == 0), max_tokens=15 + 3 * i, ignore_eos=True, logprobs=2 if i == 7 else None
        )
        for i in range(20)
    ]
    with make_engine(folder, True, max_batched_tokens=16) as engine:
        inputs = [EngineInput(engine.encode(f"{i} {WORDS[i % 7]}"), p) for i, p in enumerate(params)]
        steps = count_steps(engine)
        assert all(output.error is None for output in engine.run(inputs))
        assert engine._stepper.num_ahead > 0.9 * steps[0]


def test_what_is_under_way_is_not_computed_twice(folder):
    """Prompts with a beginning in common wait for who computes it, also where that is the step before."""
    prompts = [f"{'the same rubric for all of them, ' * 3}{i}" for i in range(12)]
    counts = []
    for ahead in (False, True):
        with make_engine(folder, ahead, max_batched_tokens=64, max_len=512) as engine:
            engine.generate(prompts, SamplingParams(max_tokens=20, ignore_eos=True))
            counts.append(engine.stats().num_forward_tokens)
    assert counts[1] <= counts[0] + len(prompts)  # a token each that turns out void


@pytest.mark.parametrize("seed", [7, 13])
def test_who_lost_its_blocks_meanwhile_starts_over(folder, seed):
    """Preempted while its step is under way, and admitted again before that is read."""
    rng = np.random.default_rng(seed)
    asked = [
        SamplingParams(
            temperature=1.0,
            seed=i,
            max_tokens=int(rng.integers(40, 90)),
            ignore_eos=True,
            logprobs=1 if rng.random() < 0.4 else None,
        )
        for i in range(12)
    ]
    limits = {"num_blocks": 66, "max_batched_tokens": 12, "prefix_caching": False, "eager": True}
    found = []
    for ahead in (False, True):
        with make_engine(folder, ahead, **limits) as engine:
            inputs = [EngineInput(engine.encode(f"p{i}"), params) for i, params in enumerate(asked)]
            outputs = sorted(engine.run(inputs), key=lambda output: output.index)
            found.append([outcome(output) for output in outputs])
            engine.check_integrity()
    assert found[0] == found[1]


def test_who_joins_a_step_that_cannot_be_launched_starts_over(folder):
    """The step was to copy the blocks that they begin in: those hold nothing."""
    beginning = "the same rubric, " * 3
    params = SamplingParams(max_tokens=25, ignore_eos=True)
    joining = [f"{beginning[:n]} later" for n in (18, 31, 42)]
    wanted = [c.token_ids for c in make_engine(folder, False).generate(joining, params)]
    with make_engine(folder, True, num_blocks=400) as engine:
        engine.generate([beginning], params)  # for the prefix cache
        runs, runner = (_Run(), _Run()), engine._parts.runner
        for i in range(3):
            engine._submit(runs[0], i, EngineInput(engine.encode(f"{i} other"), params))
        engine._step()
        for i, prompt in enumerate(joining):
            engine._submit(runs[1], i, EngineInput(engine.encode(prompt), params))
        launch = runner.launch

        def fails(batch, draws, behind):
            runner.launch = launch
            assert behind is not None and batch.block_copies
            raise RuntimeError("out of memory")

        runner.launch = fails
        with pytest.raises(RuntimeError, match="out of memory"):
            engine._step()
        while runs[1].open:
            engine._step()
        found = sorted(runs[1].outputs, key=lambda output: output.index)
        assert [output.completions[0].token_ids for output in found] == wanted
        engine.check_integrity()


def steps_of_the_first(folder, ahead, num_tokens, others, **options):
    """The steps of the first request, about whose tokens the host decides; how often it lost its blocks."""
    with make_engine(folder, ahead, prefix_caching=False, **options) as engine:
        first = SamplingParams(temperature=1.0, max_tokens=num_tokens, ignore_eos=True, logprobs=1)
        inputs = [EngineInput(engine.encode("judge me"), first)]
        inputs += [EngineInput(engine.encode(prompt), params) for prompt, params in others]
        runner, name = engine._parts.runner, "launch" if ahead else "run"
        run, steps, requests = getattr(runner, name), [], set()

        def noting(batch, *rest):
            steps.append(any(chunk.request.id == 1 for chunk in batch.chunks))
            requests.update(chunk.request for chunk in batch.chunks if chunk.request.id == 1)
            return run(batch, *rest)

        setattr(runner, name, noting)
        assert all(output.error is None for output in engine.run(inputs))
        return [i for i, there in enumerate(steps) if there], requests.pop().num_preemptions


def test_long_prompts_do_not_hold_up_who_came_before(folder):
    """A request that sits steps out has its turn at every second, however much the others could do."""
    others = [(f"{i}" + "a" * 800, SamplingParams(max_tokens=3, ignore_eos=True)) for i in range(4)]
    options = {"num_blocks": 3000, "max_len": 1024, "max_batched_tokens": 32}
    plain, _ = steps_of_the_first(folder, False, 20, others, **options)
    ahead, _ = steps_of_the_first(folder, True, 20, others, **options)
    assert plain == list(range(20)) and ahead == list(range(0, 40, 2))


def test_the_oldest_keeps_its_blocks(folder):
    params = SamplingParams(temperature=1.0, max_tokens=60, ignore_eos=True)
    others = [(f"{i}" + "a" * 40, replace(params, seed=i)) for i in range(20)]
    for ahead in (False, True):
        _, preempted = steps_of_the_first(folder, ahead, 120, others, num_blocks=66, max_batched_tokens=64)
        assert preempted == 0


def test_results_from_before_a_preemption_are_void(folder):
    with make_engine(folder, True) as engine:
        request = Request(1, (1, 2, 3), SamplingParams(), engine.tokenizer, frozenset(), 10)
        flight = _Flight(Batch((Chunk(request, 0, 3),), ()), (0,), (range(1),), (), None, frozenset())
        assert flight.valid({request}) == [0] and flight.valid(set()) == []
        engine._parts.scheduler.preempt(request)
        assert flight.valid({request}) == []


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
    found, computed = [], []
    for ahead in (False, True):
        with make_engine(folder, ahead, num_blocks=4000, max_len=2048, eager=seed % 2 == 1) as engine:
            found.append([plain(v) for v in sorted(Judge(engine).run(items), key=lambda v: v.index)])
            engine.check_integrity()
            computed.append(engine.stats().num_forward_tokens)
    assert found[0] == found[1]
    assert computed[1] <= computed[0] + 2 * sum(
        item.votes for item in items
    )  # a void token each, both orders
    assert {v["finish_reason"] for v in found[0]} == {"answer"}


@pytest.fixture(scope="module")
def vision_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("ahead-vision")
    write_vision_checkpoint(path)
    return path


@pytest.mark.parametrize("seed", range(6))
def test_judgements_of_media(vision_folder, seed):
    """Media that are encoded for steps ahead, forgotten, and end in the middle of a step."""
    rng = np.random.default_rng(seed)

    def response():
        if rng.random() < 0.3:
            return Response("A text, too.", video=clip(int(rng.integers(2))))
        return Response(image=picture(int(rng.integers(4))))

    items = [
        Judgement(
            "pair",
            "Draw.",
            [response(), response()],
            votes=int(rng.integers(1, 3)),
            order="both",
            max_think_tokens=int(rng.choice([0, 3, 20])),
            max_tokens=120,
            temperature=1.0,
        )
        for _ in range(4)
    ]
    options = {
        "num_blocks": int(rng.choice([560, 800])),
        "max_len": 2048,
        "eager": seed % 2 == 1,
        "max_batched_tokens": int(rng.choice([16, 40, 128])),
        "encoder_cache_memory": int(rng.choice([0, 1 << 22])),
    }
    found = []
    for ahead in (False, True):
        with make_engine(vision_folder, ahead, **options) as engine:
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
        assert engine._stepper._flight is not None
        first.close()
        assert engine.stats().num_running == 0 and engine._stepper._flight is None
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
