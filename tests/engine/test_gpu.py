"""The engine on a real GPU: the tokens of the CPU in float32; the same bits with graphs and in company."""

import pytest
import torch

from flexjudge_fast import Engine, Judge, Judgement, Response, SamplingParams
from tests.models import write_checkpoint, write_omni_checkpoint, write_vision_checkpoint
from tests.test_judge_media import picture

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
PROMPTS = ("hello", "a longer prompt than a block, and longer than a step may be " * 3, "a")
QUICK = {"max_think_tokens": 6, "max_tokens": 120, "seed": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("gpu")
    write_checkpoint(path)
    return path


def load(folder, device="cuda", **options):
    defaults = {"dtype": "float32", "kv_cache_memory": "64MiB", "max_model_len": 1024}
    return Engine.from_pretrained(folder, device=device, **{**defaults, **options})


def tokens(engine, params=GREEDY, prompts=PROMPTS):
    found = [(c.token_ids, c.finish_reason) for c in engine.generate(list(prompts), params)]
    engine.check_integrity()
    return found


@pytest.fixture(scope="module")
def wanted(folder):
    with load(folder, "cpu") as engine:
        return tokens(engine)


@pytest.mark.parametrize("chunk", [11, 512])
@pytest.mark.parametrize("graphs", [True, False])
def test_prefill_and_decode(folder, wanted, chunk, graphs):
    with load(folder, max_batched_tokens=chunk, cuda_graphs=graphs) as engine:
        assert tokens(engine) == wanted
        assert engine._stepper.num_ahead > 0 and (engine._parts.runner.num_replays > 0) == graphs
        assert tokens(engine) == wanted  # from the prefix cache


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0, n=4, max_tokens=12, seed=1, ignore_eos=True),
        SamplingParams(temperature=0.7, top_k=20, top_p=0.9, min_p=0.01, n=3, max_tokens=12, seed=2),
    ],
)
def test_sampled_forks(folder, params):
    with load(folder, "cpu") as engine:
        expected = tokens(engine, params)
    with load(folder) as engine:
        assert tokens(engine, params) == expected


def test_preemption(folder):
    prompts = [f"prompt number {i}, of some length" for i in range(6)]
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    with load(folder, "cpu") as engine:
        expected = tokens(engine, params, prompts)
    block = 3 * 2 * 16 * 2 * 16 * 4  # bytes: layers, sides, tokens, KV heads, head size, float32
    with load(folder, kv_cache_memory=10 * block, max_model_len=128) as engine:
        assert tokens(engine, params, prompts) == expected
        assert engine.stats().num_preemptions > 0


@pytest.mark.parametrize("options", [{"dtype": "float16"}, {"dtype": "bfloat16"}, {"quantization": "int8"}])
@pytest.mark.parametrize("graphs", [True, False])
def test_same_bits_alone_and_in_a_batch(folder, options, graphs):
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, logprobs=3)
    with load(folder, cuda_graphs=graphs, prefix_caching=False, **options) as engine:
        alone = [engine.generate([prompt], params)[0].logprobs for prompt in PROMPTS]
        assert [c.logprobs for c in engine.generate(list(PROMPTS), params)] == alone


@pytest.mark.parametrize(
    ("options", "bar"),
    [
        ({"dtype": "float16"}, 0.02),
        ({"dtype": "bfloat16"}, 0.1),
        ({"kv_cache_dtype": "int8"}, 0.05),
        ({"kv_cache_dtype": "fp8"}, 0.25),
        ({"dtype": "bfloat16", "attention_backend": "torch"}, 0.1),
    ],
)
def test_logits_near_the_cpus(folder, options, bar):
    with load(folder, "cpu") as engine:
        expected = engine.logits(PROMPTS[1])
    with load(folder, **options) as engine:
        found = engine.logits(PROMPTS[1]).cpu()
    assert (found - expected).abs().max() < bar * expected.abs().max()


@pytest.mark.parametrize("quantization", ["int4", "int4-g64", "w8a8-int8", "w8a8-fp8"])
def test_quantised_weights(tmp_path, quantization):
    write_checkpoint(tmp_path, heads=(8, 2), intermediate=256)
    only_here = quantization.startswith("w8a8")
    with load(tmp_path, "cpu", quantization=None if only_here else quantization) as engine:
        expected = engine.logits(PROMPTS[1])
    with load(tmp_path, dtype="bfloat16", quantization=quantization) as engine:
        found = engine.logits(PROMPTS[1]).cpu()
        assert len(tokens(engine)) == len(PROMPTS)
    away = (found - expected).norm() / expected.norm()
    assert away < (0.35 if only_here else 0.05), away


def test_a_judgement(folder):
    """Forced tokens, a score's distribution and its probes, both orders, votes."""
    items = [
        Judgement("pair", f"Question {i}?", ["One.", "Another."], order="both", votes=3, **QUICK)
        for i in range(4)
    ]
    _same_verdicts(folder, items)


def test_judging_pictures(tmp_path):
    write_vision_checkpoint(tmp_path)
    items = [
        Judgement("pair", "Draw.", [Response(image=picture(0)), Response(image=picture(1))], **QUICK),
        Judgement("score", "What is it?", ["A cat."], images=[picture(2, 140, 112)], **QUICK),
    ]
    _same_verdicts(tmp_path, items)


def test_judging_sounds(tmp_path):
    pytest.importorskip("soundfile", reason="soundfile is not installed")
    write_omni_checkpoint(tmp_path)
    sound = torch.randn(9000, generator=torch.Generator().manual_seed(0)).numpy() * 0.1
    _same_verdicts(tmp_path, [Judgement("score", "Read.", ["Yes."], audios=[(sound, 16000)], **QUICK)])


def _same_verdicts(folder, items):
    with load(folder, "cpu", max_model_len=4096) as engine:
        expected = list(Judge(engine).run(items))
    with load(folder, max_model_len=4096) as engine:
        found = list(Judge(engine).run(items))
    by_index = {verdict.index: verdict for verdict in found}
    for verdict in expected:
        other = by_index[verdict.index]
        assert verdict.error is None and other.error is None, (verdict.error, other.error)
        assert other.reasoning == verdict.reasoning and other.scores == verdict.scores
        assert other.expected_scores == pytest.approx(verdict.expected_scores, rel=1e-3)


def test_memory_is_measured(folder):
    """Without a size given, the cache takes its share of what is free, and generation still fits."""
    block, (free, _) = 3 * 2 * 16 * 2 * 16 * 4, torch.cuda.mem_get_info()
    with load(folder, kv_cache_memory=None, kv_cache_fraction=0.2) as engine:
        assert 0.05 * free < block * engine.stats().num_blocks <= 0.2 * free  # others may use this GPU
        assert len(tokens(engine)) == len(PROMPTS)
