"""The ops under pytest-benchmark: `make bench-ops`."""

import pytest
import torch

from bench.ops.cases import HEADS, IMAGES, attention_case, image_case, linear_cases, sampler_case
from flexjudge_fast.ops.backend import has_compiled_ops
from flexjudge_fast.ops.dequantize import dequantize
from flexjudge_fast.weights.formats import QUANT_FORMATS

pytestmark = pytest.mark.skipif(not has_compiled_ops(), reason="the compiled library is not built")
THREADS = 2

FORMATS = ["Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K", "I8_32", "I4_128", "BF16", "F32"]


@pytest.mark.parametrize("format_name", FORMATS)
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


@pytest.mark.parametrize("size", IMAGES)
def test_image(benchmark, size):
    benchmark(image_case(size, THREADS).call)


@pytest.mark.parametrize("found", QUANT_FORMATS, ids=lambda found: found.name)
@pytest.mark.parametrize("threads", [1, THREADS])
def test_dequantize(benchmark, found, threads):
    """What loading costs: 76.8 million weights to float32."""
    rows, columns = 100_000, 768
    generator = torch.Generator().manual_seed(0)
    shape = (rows, columns // found.block_size * found.block_bytes)
    blocks = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    benchmark(dequantize, blocks, found.name)
    torch.set_num_threads(before)
    benchmark.extra_info["weights_per_second"] = rows * columns / benchmark.stats.stats.median
