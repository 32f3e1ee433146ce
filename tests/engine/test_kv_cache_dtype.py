"""The engine argument `kv_cache_dtype`: memory, what is written, and what it costs in accuracy."""

import pytest
import torch

from flexjudge_fast import Engine, InvalidArgumentError, NumericalError, SamplingParams
from flexjudge_fast.engine.model_runner import kv_bytes_per_token
from flexjudge_fast.ops.backend import has_compiled_ops
from flexjudge_fast.ops.kv_cache import to_kv_rows
from tests.kv_layout import kernel_order, plain_order
from tests.models import write_checkpoint

PROMPT = [(7 * i * i + 3 * i) % 250 for i in range(70)]
TEXT = (
    "The judge reads a question and two answers. It reasons about both before it gives a score, because a "
    "score without a reason is hard to trust. A good answer is correct, complete and short; a bad one may be "
    "any of three things: wrong, evasive, or so long that nobody reads it. In 1969 two people walked on the "
    "Moon, and some 600 million watched them. Water boils at 100 degrees Celsius at sea level, but at 70 on "
    "the top of Mount Everest."
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("kv")
    write_checkpoint(path, family="qwen2", heads=(6, 2))
    return path


@pytest.fixture(params=["compiled", "reference"])
def backend(request, monkeypatch):
    if request.param == "compiled" and not has_compiled_ops():
        pytest.skip("the compiled ops are not built here")
    monkeypatch.setattr(
        "flexjudge_fast.models.registry.has_compiled_ops", lambda: request.param == "compiled"
    )
    return request.param


@pytest.fixture
def compiled():
    if not has_compiled_ops():
        pytest.skip("the compiled ops are not built here")


def make(folder, kv_cache_dtype: str = "auto", **limits) -> Engine:
    return Engine.from_pretrained(
        folder, kv_cache_dtype=kv_cache_dtype, **{"kv_cache_memory": "16MiB", **limits}
    )


def cache_of(engine: Engine) -> torch.Tensor:
    return engine._parts.runner.cache


def mean_kl(expected: torch.Tensor, got: torch.Tensor) -> float:
    """Mean over the rows of the Kullback-Leibler divergence of the next token's distributions."""
    p, q = expected.double().log_softmax(-1), got.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize(
    ("name", "dtype", "token_bytes"),
    [("auto", "float32", 64), ("float32", "float32", 64), ("bfloat16", "bfloat16", 32), ("int8", "int8", 20)],
)
def test_memory(folder, name, dtype, token_bytes):
    """Heads of 16 numbers: 2 sides, 3 layers, 2 KV heads."""
    engine = make(folder, name, kv_cache_memory=100_000)
    num_blocks = 100_000 // (16 * 2 * 3 * 2 * token_bytes)
    cache = cache_of(engine)
    assert engine.stats().num_blocks == num_blocks
    assert cache.dtype == getattr(torch, dtype)
    assert cache.nbytes == num_blocks * 16 * 2 * 3 * 2 * token_bytes
    config = engine._parts.runner.model.config
    assert kv_bytes_per_token(config, cache.dtype) == 2 * 3 * 2 * token_bytes


@pytest.mark.parametrize("bad", ["int4", "INT8", "", None, 8])
def test_unknown_names_are_refused(folder, bad):
    with pytest.raises(InvalidArgumentError, match=r"kv_cache_dtype=.*int8"):
        make(folder, bad)


@pytest.mark.parametrize("name", ["bfloat16", "float16", "int8"])
def test_close_to_float32(folder, name, backend):
    expected = make(folder, "float32").logits(PROMPT)
    got = make(folder, name).logits(PROMPT)
    assert not torch.equal(got, expected)
    assert 0 < mean_kl(expected, got) < 1e-3


@pytest.mark.parametrize("name", ["float32", "int8"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("row", [6 * 16 + 3, 8 * 16 + 20], ids=["key", "value"])
def test_bad_keys_and_values_reach_the_logits(folder, name, bad, row, backend):
    """One number of each token's key or value is bad: what follows must not look sound."""
    engine = make(folder, name)
    model = engine._parts.runner.model
    layer = model.plan.model.layers[0] if backend == "compiled" else model.layers[0].attention
    layer.qkv.bias[row] = bad
    with pytest.raises(NumericalError):
        engine.generate([PROMPT], SamplingParams(max_tokens=1))


def test_backends_agree_on_int8(folder, compiled, monkeypatch):
    """Both quantise in the same way, but for codes that the last bit of a key turns over."""
    got = make(folder, "int8").logits(PROMPT)
    monkeypatch.setattr("flexjudge_fast.models.registry.has_compiled_ops", lambda: False)
    assert mean_kl(make(folder, "int8").logits(PROMPT), got) < 1e-5


@pytest.mark.parametrize("block_size", [16, 5])
def test_codes_are_those_of_the_reference(folder, block_size, compiled):
    """The first layer's keys and values do not depend on the cache: int8 holds float32's, quantised."""
    caches = {}
    for name, token_bytes in (("float32", 768), ("int8", 240)):
        memory = 20 * block_size * token_bytes
        engine = make(folder, name, kv_cache_memory=memory, block_size=block_size)
        cache_of(engine).zero_()
        engine.logits(PROMPT)
        caches[name] = cache_of(engine)[:1]
    rows = to_kv_rows(plain_order(caches["float32"]), torch.int8)
    assert (rows != 0).any(-1).sum() == 2 * 2 * len(PROMPT)
    assert torch.equal(kernel_order(rows), caches["int8"])


def test_smollm2_stays_close(smollm2_path):
    engines = [
        make(smollm2_path, name, max_model_len=512, kv_cache_memory="64MiB") for name in ("auto", "int8")
    ]
    expected, got = (engine.logits(TEXT) for engine in engines)
    assert mean_kl(expected, got) < 2e-3  # measured: 0.95e-3; on 1565 tokens of docs/architecture.md 0.67e-3
    assert (expected.argmax(-1) == got.argmax(-1)).float().mean() > 0.95  # measured: 0.991
