"""The engine used rightly and wrongly, on a tiny random model."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future

import pytest
import torch
from safetensors.torch import load_file, save_file

from flexjudge_fast import (
    CheckpointError,
    Engine,
    EngineStateError,
    InvalidArgumentError,
    Judge,
    Judgement,
    NumericalError,
    RequestTooLargeError,
    SamplingParams,
    UnsupportedCheckpointError,
    UnsupportedMediaError,
)
from flexjudge_fast.engine.engine import EngineInput
from flexjudge_fast.prompts.segments import Prompt
from tests.models import write_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("engine")
    write_checkpoint(path)
    return path


@pytest.fixture(scope="module")
def engine(folder):
    return Engine.from_pretrained(folder, kv_cache_memory="64MiB")


SAMPLED = SamplingParams(temperature=1.0, max_tokens=20, seed=3)


def test_a_draw_does_not_depend_on_the_batch(engine):
    alone = engine.generate(["hello"], SAMPLED)[0].token_ids
    crowd = engine.generate(["a", "hello", "b" * 40], SAMPLED)[1].token_ids
    assert alone == crowd
    assert alone != engine.generate(["hello"], SamplingParams(max_tokens=20, seed=4))[0].token_ids


def test_samples_differ_and_are_reproducible(engine):
    params = SamplingParams(max_tokens=20, n=4)
    first = [c.token_ids for c in engine.generate(["hello"], params)]
    assert len(set(first)) == 4
    assert first == [c.token_ids for c in engine.generate(["hello"], params)]


def test_prompt_forms_and_logprobs(engine):
    params = SamplingParams(temperature=0, max_tokens=5, logprobs=2, ignore_eos=True)
    text, ids = engine.generate(["hi", list(engine.encode("hi").token_ids)], params)
    assert text.token_ids == ids.token_ids
    assert [max(lp, key=lp.get) for lp in text.logprobs] == list(text.token_ids)
    chat = engine.generate([[{"role": "user", "content": "<|im_end|>"}]], params)[0]
    assert chat.prompt_token_ids.count(257) == 1  # the template's own, not the content's


def test_stop_strings(engine):
    free = engine.generate(["hello"], SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))[0]
    stop = next(char for char in free.text[1:] if char.isascii())
    cut = engine.generate(
        ["hello"], SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, stop=(stop,))
    )[0]
    assert cut.finish_reason == "stop"
    assert cut.text == free.text[: free.text.find(stop)]


def test_too_large_is_refused_with_the_numbers(engine):
    with pytest.raises(RequestTooLargeError, match=r"5000 tokens.*4096"):
        engine.generate([[1] * 5000])
    outputs = {o.index: o for o in engine.run(EngineInput(Prompt((1,) * n), SAMPLED) for n in (3, 5000, 4))}
    assert isinstance(outputs[1].error, RequestTooLargeError)
    assert outputs[0].completions and outputs[2].completions


@pytest.mark.parametrize("prompt", [[], [-1], [10**6], [1.5], [True]])
def test_bad_prompts(engine, prompt):
    with pytest.raises(InvalidArgumentError, match="prompt"):
        engine.generate([prompt])


def test_two_threads_share_one_judge(folder):
    judge = Judge.from_pretrained(folder, kv_cache_memory="64MiB")
    alone = {n: judge.compare("Q?", [f"a{n}", f"b{n}"], max_tokens=80).scores for n in range(8)}
    got: dict[int, object] = {}

    def work(part: int) -> None:
        for n in range(part, 8, 2):
            got[n] = judge.compare("Q?", [f"a{n}", f"b{n}"], max_tokens=80).scores

    threads = [threading.Thread(target=work, args=(part,)) for part in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == alone
    judge.engine.check_integrity()
    assert judge.engine.stats().num_used_blocks == 0


def test_an_abandoned_generator_gives_its_blocks_back(engine):
    outputs = engine.run(EngineInput(Prompt((n,) * 20), SAMPLED) for n in range(50))
    next(outputs)
    del outputs
    assert engine.stats().num_used_blocks == 0
    assert engine.stats().num_running == engine.stats().num_waiting == 0
    engine.check_integrity()


def test_an_interrupt_inside_a_step_leaves_the_engine_whole(engine, monkeypatch):
    step = engine._parts.runner.model.step
    calls = 0

    def interrupted(*args):
        nonlocal calls
        calls += 1
        if calls == 5:
            os.kill(os.getpid(), signal.SIGINT)  # held back until the step is over
        if calls == 9:
            raise MemoryError("a step that fails half way")
        return step(*args)

    want = engine.generate(["one", "two"], SAMPLED)
    monkeypatch.setattr(engine._parts.runner.model, "step", interrupted)
    for error in (KeyboardInterrupt, MemoryError):
        with pytest.raises(error):
            engine.generate(["one", "two"], SAMPLED)
        assert engine.stats().num_used_blocks == 0
        engine.check_integrity()
    assert [c.token_ids for c in engine.generate(["one", "two"], SAMPLED)] == [c.token_ids for c in want]


def test_nan_logits_fail_one_request_only(engine, monkeypatch):
    step = engine._parts.runner.model.step

    def poisoned(*args):
        logits, finite = step(*args)
        if len(logits) == 3:
            logits[1] = torch.nan
            finite[1] = False
        return logits, finite

    want = [c.token_ids for c in engine.generate(["x", "z"], SAMPLED)]
    monkeypatch.setattr(engine._parts.runner.model, "step", poisoned)
    outputs = {o.index: o for o in engine.run(EngineInput(engine.encode(p), SAMPLED) for p in "xyz")}
    assert isinstance(outputs[1].error, NumericalError)
    assert [outputs[i].completions[0].token_ids for i in (0, 2)] == want
    engine.check_integrity()


def test_a_fork_after_import_works_and_a_forked_engine_says_so(folder):
    code = f"""
import os, sys
import flexjudge_fast
child = os.fork()
if child == 0:
    engine = flexjudge_fast.Engine.from_pretrained({str(folder)!r}, kv_cache_memory="16MiB")
    assert engine.generate(["a"], flexjudge_fast.SamplingParams(max_tokens=3))
    if os.fork() == 0:
        try:
            engine.generate(["a"])
        except flexjudge_fast.EngineStateError:
            os._exit(7)
        os._exit(1)
    os._exit(os.waitstatus_to_exitcode(os.wait()[1]))
sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 7


def test_a_closed_engine_says_so(folder):
    with Engine.from_pretrained(folder, kv_cache_memory="16MiB") as engine:
        pass
    with pytest.raises(EngineStateError, match="closed"):
        engine.generate(["a"])


def test_media_are_refused_until_a_model_reads_them(folder, engine):
    judge = Judge(engine)
    with pytest.raises(UnsupportedMediaError, match="image"):
        judge.score("Q", "A", images=["picture.png"])
    with pytest.raises(UnsupportedMediaError, match="image"):
        engine.generate([[{"role": "user", "content": [{"type": "image", "image": "a.png"}]}]])
    heard = Judgement("score", "Q", ("A",), audios=("a.wav",))
    read = Judgement("score", "Q", ("A",), max_think_tokens=0)
    verdicts = {v.index: v for v in judge.run([heard, read])}
    assert verdicts[0].finish_reason == "error" and "audio" in verdicts[0].error
    assert verdicts[1].finish_reason == "answer"


def test_import_is_light():
    code = "import sys, flexjudge_fast; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def broken_copy(folder, target, name="config.json", **changes):
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    config = json.loads((target / name).read_text())
    config.update(changes)
    (target / name).write_text(json.dumps(config))
    return target


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("architectures", ["MambaForCausalLM"]),
        ("hidden_act", "gelu"),
        ("num_attention_heads", 0),
        ("hidden_size", "64"),
        ("some_new_maths", 3),
        ("rope_parameters", {"rope_type": "longrope"}),
        ("quantization_config", {"quant_method": "gptq"}),
        ("layer_types", ["sliding_attention"]),
    ],
)
def test_config_fields_that_change_the_maths(folder, tmp_path, field, value):
    broken_copy(folder, tmp_path, **{field: value})
    with pytest.raises(
        UnsupportedCheckpointError, match="rope_type" if field == "rope_parameters" else field
    ):
        Engine.from_pretrained(tmp_path)


def test_nan_and_misshapen_weights_are_named(folder, tmp_path):
    broken_copy(folder, tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.down_proj.weight"
    good = tensors[name].clone()
    for bad in (good * torch.nan, good[:-1].clone()):
        tensors[name] = bad
        save_file(tensors, path)
        with pytest.raises(CheckpointError, match=name):
            Engine.from_pretrained(tmp_path, kv_cache_memory="16MiB")
    del tensors[name]
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=name):
        Engine.from_pretrained(tmp_path, kv_cache_memory="16MiB")


def test_bad_engine_arguments(folder):
    for options, name in [
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"kv_cache_memory": "lots"}, "kv_cache_memory"),
        ({"kv_cache_memory": 10}, "kv_cache_memory"),
        ({"kv_cache_fraction": 2}, "kv_cache_fraction"),
        ({"max_model_len": 10**6}, "max_model_len"),
        ({"colour": "red"}, "colour"),
        ({"quantization": "int3"}, "quantization"),
        ({"device": "abacus"}, "device"),
        ({"dtype": "int8"}, "dtype"),
    ]:
        with pytest.raises(InvalidArgumentError, match=name):
            Engine.from_pretrained(folder, **options)


def test_streaming_gives_the_whole_text(engine):
    events: dict[tuple[int, int], str] = {}

    def on_text(index, sample, text):
        events[index, sample] = events.get((index, sample), "") + text

    params = SamplingParams(max_tokens=20, n=2)
    outputs = list(engine.run([EngineInput(engine.encode("abc"), params)], on_text))
    for completion in outputs[0].completions:
        assert events[0, completion.sample_index] == completion.text


def test_waiting_does_not_spin(engine):
    start = time.process_time()
    assert list(engine.run([])) == []
    assert time.process_time() - start < 0.5


@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_nan_with_votes_and_probes_ends_in_an_error(folder, step):
    """Not finite before the fork, at a score, at a probe: an error each time, and the engine goes on."""
    judge = Judge.from_pretrained(folder, kv_cache_memory="32MiB")
    model = judge.engine._parts.runner.model
    run, calls = model.step, 0

    def poisoned(*args):
        nonlocal calls
        calls += 1
        logits, finite = run(*args)
        return (logits * torch.nan, finite & False) if calls == step else (logits, finite)

    want = judge.score("Q", "A", votes=2, max_think_tokens=2).scores
    model.step = poisoned
    with pytest.raises(NumericalError):
        judge.score("Q", "B", votes=2, max_think_tokens=2)
    assert judge.score("Q", "A", votes=2, max_think_tokens=2).scores == want
    judge.engine.check_integrity()
    assert judge.engine.stats().num_used_blocks == 0


def test_threads_with_streams_lose_nothing(folder):
    judge = Judge.from_pretrained(folder, kv_cache_memory="64MiB")
    seen: list[tuple[str, str]] = []

    def work() -> None:
        for n in range(6):
            text: list[str] = []
            verdict = judge.score(
                f"Q{n}", "A", max_tokens=60, stream=lambda e, text=text: text.append(e.text)
            )
            seen.append((verdict.reasoning, "".join(text)))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 18
    assert all("</answer>" in text and reasoning in text for reasoning, text in seen)


def test_a_future_in_place_of_an_input_holds_nobody_up(engine):
    waited_for = Future()

    def inputs():
        yield EngineInput(engine.encode("first"), SAMPLED)
        while not waited_for.done():
            yield waited_for
        yield EngineInput(engine.encode("second"), SAMPLED)

    outputs = engine.run(inputs())
    assert next(outputs).index == 0
    threading.Timer(0.05, waited_for.set_result, [None]).start()
    assert [output.index for output in outputs] == [1]
