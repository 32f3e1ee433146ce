"""Layers on the kernels' path: what weights become, and the same results as in plain torch."""

from pathlib import Path

import pytest
import torch

from flexjudge_fast.engine.engine import Engine
from flexjudge_fast.errors import InvalidArgumentError
from flexjudge_fast.layers.linear import Linear
from flexjudge_fast.layers.mlp import GatedMLP
from flexjudge_fast.layers.norm import RMSNorm
from flexjudge_fast.ops.linear_w4a16 import W4Matrix
from flexjudge_fast.ops.linear_w8a8 import QuantizedTokens, W8Matrix, repack_w8
from flexjudge_fast.ops.quantize import quantize_reference
from flexjudge_fast.ops.swiglu import swiglu
from flexjudge_fast.weights.formats import find_format
from flexjudge_fast.weights.quantization import find_activation_quantization
from flexjudge_fast.weights.tensor import DenseTensor, QuantTensor
from tests.models import write_checkpoint


def _quantised(weight: torch.Tensor, name: str) -> QuantTensor:
    found = find_format(name)
    assert found is not None
    return QuantTensor(quantize_reference(weight, name), found, (weight.shape[0], weight.shape[1]))


@pytest.mark.parametrize("name", ["Q4_1", "I4_64", "I4_128", "I8_32"])
@pytest.mark.parametrize("merge", [True, False])
def test_blocks(monkeypatch: pytest.MonkeyPatch, name: str, merge: bool) -> None:
    x, bias = torch.randn(5, 256), torch.randn(110)
    weights = [_quantised(torch.randn(rows, 256), name) for rows in (70, 40)]
    monkeypatch.setenv("FLEXJUDGE_BACKEND", "reference")
    plain = Linear(weights, bias, merge)
    expected = plain(x)
    assert plain.weights == plain.matrices
    monkeypatch.setenv("FLEXJUDGE_BACKEND", "triton")
    layer = Linear(weights, bias, merge)
    assert all(isinstance(m, W4Matrix) == (name != "I8_32") for m in layer.matrices)
    assert layer.out_features == 110
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-4)


def test_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weights, bias = (
        torch.randn(5, 96),
        [DenseTensor(torch.randn(n, 96)) for n in (70, 40)],
        torch.randn(110),
    )
    expected = Linear(weights, bias)(x)
    monkeypatch.setenv("FLEXJUDGE_BACKEND", "triton")
    torch.testing.assert_close(Linear(weights, bias)(x), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["w8a8-int8", "w8a8-fp8"])
def test_eight_bits(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    scheme = find_activation_quantization(name)
    assert scheme is not None
    x, weights, bias = (
        torch.randn(5, 96),
        [DenseTensor(torch.randn(n, 96)) for n in (70, 40)],
        torch.randn(110),
    )
    dense = Linear(weights, bias)(x)
    expected = Linear(weights, bias, eight_bits=scheme.dtype)(x)
    assert (expected - dense).norm() < (0.02 if name == "w8a8-int8" else 0.06) * dense.norm()
    monkeypatch.setenv("FLEXJUDGE_BACKEND", "triton")
    layer = Linear(weights, bias, eight_bits=scheme.dtype)
    assert [type(m) for m in layer.matrices] == [W8Matrix]
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_what_feeds_eight_bits_is_quantised_in_the_same_launch(dtype, monkeypatch) -> None:
    """The bits are those of a norm and a SwiGLU that are quantised afterwards."""
    monkeypatch.setenv("FLEXJUDGE_BACKEND", "triton")
    x, residual = torch.randn(3, 40), torch.randn(3, 40)
    gate_up = Linear([DenseTensor(torch.randn(96, 40))], eight_bits=dtype)
    down = Linear([DenseTensor(torch.randn(40, 48))], eight_bits=dtype)
    norm = RMSNorm(torch.randn(40), 1e-6)
    assert gate_up.takes == down.takes == dtype
    assert torch.equal(gate_up(norm.before(gate_up, x)), gate_up(norm(x)))
    fed, total = norm.add_before(gate_up, x, residual)
    normed, expected_total = norm.add(x, residual)
    assert isinstance(fed, QuantizedTokens) and torch.equal(total, expected_total)
    expected = down(swiglu(gate_up(normed)))
    monkeypatch.setattr("flexjudge_fast.layers.linear.quantize_tokens", None)  # not needed from here on
    assert torch.equal(GatedMLP(gate_up, down)(fed), expected)


def test_layers_of_several_kinds_take_plain_activations() -> None:
    codes = repack_w8(torch.randn(4, 32), torch.int8)
    layer = Linear([codes, DenseTensor(torch.randn(4, 32))])
    assert layer.takes is None and isinstance(
        RMSNorm(torch.ones(32), 1e-6).before(layer, torch.ones(1, 32)), torch.Tensor
    )
    with pytest.raises(TypeError, match="quantised activations"):
        layer(QuantizedTokens(torch.ones(1, 32, dtype=torch.int8), torch.ones(1), torch.float32))


def test_eight_bits_are_for_layers_that_have_more() -> None:
    scheme = find_activation_quantization("w8a8-int8")
    assert scheme is not None
    name, weight = "model.layers.0.mlp.up_proj.weight", torch.randn(4, 32)
    assert scheme.dtype_of(name, DenseTensor(weight)) == torch.int8
    assert scheme.dtype_of("lm_head.weight", DenseTensor(weight)) is None
    with pytest.raises(InvalidArgumentError, match="is quantised already"):
        scheme.dtype_of(name, _quantised(weight, "I8_32"))


def test_eight_bits_need_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("FLEXJUDGE_BACKEND")
    write_checkpoint(tmp_path)
    with pytest.raises(InvalidArgumentError, match="'w8a8-int8' needs a GPU, not device='cpu'"):
        Engine.from_pretrained(tmp_path, device="cpu", quantization="w8a8-int8")
