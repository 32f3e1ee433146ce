"""The ops under pytest-benchmark: `make bench-ops`."""

import pytest

from bench.ops.cases import HEADS, attention_case, linear_cases, sampler_case
from flexjudge_fast.ops.backend import has_compiled_ops

pytestmark = pytest.mark.skipif(not has_compiled_ops(), reason="the compiled library is not built")
THREADS = 2


@pytest.mark.parametrize("format_name", ["Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K", "BF16", "F32"])
@pytest.mark.parametrize("tokens", [1, 8, 512])
def test_packed_linear(benchmark, format_name, tokens):
    """16-bit activations, where the weight is quantised."""
    case = next(linear_cases([format_name], [tokens], THREADS))
    benchmark.extra_info["read_bytes"] = case.read_bytes
    benchmark(case.call)


@pytest.mark.parametrize("heads", list(HEADS))
@pytest.mark.parametrize(("batch", "new", "context"), [(1, 512, 512), (1, 1, 2048), (8, 1, 2048)])
def test_packed_attention(benchmark, heads, batch, new, context):
    benchmark(attention_case("attention", HEADS[heads], batch, new, context, THREADS).call)


@pytest.mark.parametrize("rows", [1, 8, 64])
@pytest.mark.parametrize("greedy", [True, False])
def test_sample_tokens(benchmark, rows, greedy):
    benchmark(sampler_case(rows, greedy, THREADS).call)
