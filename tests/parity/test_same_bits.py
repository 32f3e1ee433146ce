"""The same request gives the same bits: alone, beside others, in any chunks, on any number of threads."""

import pytest
import torch

from flexjudge_fast import Engine
from flexjudge_fast.engine.engine import EngineInput
from flexjudge_fast.engine.sampling_params import SamplingParams
from flexjudge_fast.ops.backend import has_compiled_ops
from flexjudge_fast.prompts.segments import Prompt
from flexjudge_fast.weights.quantization import QUANTIZATIONS
from tests.models import write_checkpoint

PROMPT = [(7 * i * i + 3 * i) % 250 for i in range(300)]  # crosses the attention's chunks of 256 positions


@pytest.fixture(scope="module", autouse=True)
def compiled():
    if not has_compiled_ops():
        pytest.skip("the compiled ops are not built here; torch's own products promise no equal bits")


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bits")
    write_checkpoint(folder, family="qwen2", heads=(6, 2))
    return folder


def logits(path, **limits) -> torch.Tensor:
    return Engine.from_pretrained(path, max_model_len=512, kv_cache_memory="64MiB", **limits).logits(PROMPT)


@pytest.mark.parametrize("activations", ["int16", "int8"])
def test_chunks_and_threads_quantised(smollm2_folder, activations):
    want = logits(smollm2_folder, activations=activations)
    for chunk, threads in ((1, 1), (5, 2), (64, 3)):
        got = logits(smollm2_folder, activations=activations, max_batched_tokens=chunk, num_threads=threads)
        assert torch.equal(got, want)


@pytest.mark.parametrize("activations", ["int16", "int8"])
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_chunks_and_threads_of_our_own_formats(tmp_path, quantization, activations):
    write_checkpoint(tmp_path, heads=(8, 2), intermediate=256)  # whole groups of every size
    how = {"quantization": quantization, "activations": activations}
    want = logits(tmp_path, **how)
    for chunk, threads in ((1, 1), (9, 2), (64, 3)):
        assert torch.equal(logits(tmp_path, **how, max_batched_tokens=chunk, num_threads=threads), want)


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
@pytest.mark.parametrize("block_size", [3, 16, 48])
def test_chunks_blocks_and_threads_dense(tiny_folder, block_size, kv_cache_dtype):
    """The block size may change where chunks of keys end, not what they hold: the bits are equal too."""
    cache = {"kv_cache_dtype": kv_cache_dtype}
    want = logits(tiny_folder, **cache)
    for chunk, threads in ((1, 2), (7, 1), (300, 3)):
        got = logits(
            tiny_folder, **cache, block_size=block_size, max_batched_tokens=chunk, num_threads=threads
        )
        assert torch.equal(got, want)


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
def test_beside_others_and_with_a_warm_cache(smollm2_folder, kv_cache_dtype):
    engine = Engine.from_pretrained(
        smollm2_folder, max_model_len=512, kv_cache_memory="256MiB", kv_cache_dtype=kv_cache_dtype
    )
    params = SamplingParams(max_tokens=1)
    alone = engine.logits(PROMPT)
    others = [PROMPT[:150] + [9, 8, 7] * i for i in range(1, 12)]
    inputs = [EngineInput(Prompt(tuple(p)), params, all_logits=True) for p in [*others, PROMPT]]
    outputs = {o.index: o.logits for o in engine.run(inputs)}
    assert torch.equal(outputs[len(others)], alone)
    for i in (0, 5, 10):
        assert torch.equal(outputs[i], engine.logits(others[i]))


@pytest.mark.parametrize("kv_cache_dtype", ["float32", "bfloat16", "int8"])
def test_forked_preempted_and_behind_a_partial_block(tiny_folder, kv_cache_dtype):
    """Three samples of each prompt: tokens and log-probabilities of an engine of its own."""
    params = SamplingParams(temperature=1, seed=5, max_tokens=40, ignore_eos=True, logprobs=5, n=3)
    prompts = [[*PROMPT[: 7 * i + 60], i] for i in range(5)]  # each shares a part of a block with the next

    def results(batch, **limits):
        limits = {"max_model_len": 512, "kv_cache_memory": "64MiB", **limits}
        engine = Engine.from_pretrained(tiny_folder, kv_cache_dtype=kv_cache_dtype, **limits)
        cold = [(c.token_ids, c.logprobs) for c in engine.generate(batch, params)]
        assert [(c.token_ids, c.logprobs) for c in engine.generate(batch, params)] == cold
        engine.check_integrity()
        return cold, engine.stats()

    want = [sample for prompt in prompts for sample in results([prompt])[0]]
    together, stats = results(prompts)
    assert together == want
    assert stats.num_cached_tokens > 0
    row_bytes = {"float32": 64, "bfloat16": 32, "int8": 20}[kv_cache_dtype]
    tight, stats = results(prompts, kv_cache_memory=300 * 2 * 3 * 2 * row_bytes, num_threads=3)
    assert tight == want
    assert stats.num_preemptions > 0
