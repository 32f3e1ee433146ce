"""Embedding rows, empty and ragged inputs on both backends, and how a backend is chosen."""

import os
import subprocess
import sys

import pytest
import torch

from flexjudge_fast.ops.dequantize import dequantize, dequantize_reference
from flexjudge_fast.ops.embedding import embedding, quantized_embedding
from flexjudge_fast.ops.linear import linear, quantized_linear
from flexjudge_fast.weights.formats import QUANT_FORMATS


def random_q8_0(rows: int, blocks: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    data = torch.randint(0, 256, (rows, blocks, 34), dtype=torch.uint8, generator=generator)
    data[..., :2] = torch.tensor([0.01], dtype=torch.float16).view(torch.uint8)
    return data.reshape(rows, -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ids", [[], [3], [6, 0, 6, 2]])
def test_embedding(ids, dtype):
    blocks = random_q8_0(7, 3)
    index = torch.tensor(ids, dtype=torch.int64)
    table = dequantize_reference(blocks, "Q8_0").to(dtype)
    got = quantized_embedding(index, blocks, "Q8_0", dtype)
    assert got.dtype == dtype
    assert torch.equal(got, table[index])
    assert torch.equal(embedding(index, table), table[index])


@pytest.mark.parametrize("found", QUANT_FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize("expand", [dequantize, dequantize_reference])
def test_no_rows_and_broken_rows(found, expand):
    assert expand(torch.empty(0, 2 * found.block_bytes, dtype=torch.uint8), found.name).shape == (
        0,
        2 * found.block_size,
    )
    # As many bytes as two whole blocks, but in rows that cut them.
    ragged = torch.zeros(2 * found.block_bytes, 1, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=f"whole {found.name} blocks"):
        expand(ragged, found.name)


def test_rows_that_are_not_contiguous():
    wide = random_q8_0(6, 4)
    view = wide[::2, : 2 * 34]
    assert torch.equal(dequantize(view, "Q8_0"), dequantize_reference(view.contiguous(), "Q8_0"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_quantized_linear_keeps_the_dtype(dtype):
    blocks = random_q8_0(40, 2)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(6)).to(dtype)
    got = quantized_linear(x, blocks, "Q8_0")
    assert got.dtype == dtype
    want = linear(x, dequantize_reference(blocks, "Q8_0").to(dtype))
    torch.testing.assert_close(got, want)


def test_threads_do_not_change_the_result():
    blocks = random_q8_0(4099, 24)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = dequantize(blocks, "Q8_0")
        torch.set_num_threads(2)
        assert torch.equal(dequantize(blocks, "Q8_0"), one)
    finally:
        torch.set_num_threads(before)


def run(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout + done.stderr


def test_the_reference_can_be_asked_for():
    code = "from flexjudge_fast.ops.backend import has_compiled_ops as h; print(h())"
    assert run(code, FLEXJUDGE_BACKEND="reference").strip() == "False"


def test_a_missing_library_is_said_once():
    code = (
        "import pathlib; pathlib.Path.glob = lambda *a: iter(())\n"
        "from flexjudge_fast.ops.backend import has_compiled_ops as h\n"
        "assert not h() and not h()"
    )
    assert run(code, FLEXJUDGE_BACKEND="").count("it was not built") == 1
