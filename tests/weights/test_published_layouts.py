"""GPTQ, AWQ, compressed-tensors and bitsandbytes folders: the numbers that independent code gives."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from flexjudge_fast import Engine, SamplingParams
from flexjudge_fast.cli import app
from flexjudge_fast.errors import InvalidArgumentError, UnsupportedCheckpointError
from flexjudge_fast.models.loader import TensorLoader
from flexjudge_fast.ops.linear_w4a16 import W4Matrix, dequantize_w4
from flexjudge_fast.ops.linear_w8a8 import W8Matrix, dequantize_w8
from flexjudge_fast.weights.checkpoint import open_checkpoint
from flexjudge_fast.weights.tensor import DenseTensor, QuantTensor
from tests.models import write_checkpoint, write_vision_checkpoint
from tests.published import LAYOUTS, edit_config, publish, save

NAME = "model.layers.1.mlp.down_proj"
PROMPT = "The quick brown fox"
NEEDS_PACKAGE = {"nf4", "nf4-nested", "fp4", "bnb-int8"}
HAS_PACKAGE = importlib.util.find_spec("bitsandbytes") is not None
W8 = {"int8": "Z8_32", "int8-tensor": "Z8_32", "fp8": ""}


def need(layout: str) -> None:
    if layout in NEEDS_PACKAGE and not HAS_PACKAGE:
        pytest.skip("bitsandbytes is not installed")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of 128 and 256 columns."""
    folder = tmp_path_factory.mktemp("source")
    write_checkpoint(folder, heads=(8, 2), intermediate=256, seed=5)
    return folder


@pytest.fixture(scope="module", params=LAYOUTS)
def pair(
    request: pytest.FixtureRequest, source: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, Path]:
    """A layout's name, its folder, and a folder of the same numbers, dense."""
    need(request.param)
    folders = publish(source, tmp_path_factory.mktemp("published"), LAYOUTS[request.param])
    return (request.param, *folders)


def run(folder: Path, device: str = "cpu") -> tuple[torch.Tensor, list[int]]:
    """Logits and greedy tokens."""
    engine = Engine.from_pretrained(
        folder, dtype="float32", device=device, max_model_len=64, kv_cache_memory="16MiB"
    )
    try:
        (done,) = engine.generate([PROMPT], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))
        return engine.logits(PROMPT).cpu(), done.token_ids
    finally:
        engine.close()


def test_weights_are_exact(pair: tuple[str, Path, Path]) -> None:
    name, folder, dense = pair
    checkpoint, plain = open_checkpoint(folder), open_checkpoint(dense)
    assert sorted(checkpoint.tensor_names()) == sorted(plain.tensor_names())
    for tensor in plain.tensor_names():
        want = plain.tensor(tensor).to_dense(torch.float32)
        found = checkpoint.tensor(tensor)
        assert found.is_finite() and tuple(found.shape) == tuple(want.shape)
        if name == "bnb-int8":  # bitsandbytes multiplies by 1 / 127
            torch.testing.assert_close(found.to_dense(torch.float32), want, rtol=1e-6, atol=0)
        elif name.startswith(("nf4", "fp4")):  # and its CPU kernel rounds in another order
            torch.testing.assert_close(found.to_dense(torch.float32), want, rtol=2**-7, atol=1e-6)
        else:
            assert torch.equal(found.to_dense(torch.float32), want)


def test_an_engine_gives_the_dense_models_logits(pair: tuple[str, Path, Path]) -> None:
    name, folder, dense = pair
    (logits, tokens), (want, want_tokens) = run(folder), run(dense)
    limit = 0.05 if name.startswith(("nf4", "fp4")) else 2e-3  # of logits some 3 apart
    assert (logits - want).abs().max() < limit
    assert tokens == want_tokens


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu(pair: tuple[str, Path, Path]) -> None:
    """Tokens become 8 bits in W8A8; all else is the dense model's."""
    name, folder, dense = pair
    (found, _), (wanted, _) = run(folder, "cuda"), run(dense)
    assert (found - wanted).norm() / wanted.norm() < (0.35 if name in W8 else 0.01)


def test_kernels_get_what_they_read(pair: tuple[str, Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """On the GPU's path: q, k and v merged, in 4 bits or in 8 beside 8-bit activations."""
    name, folder, dense = pair
    monkeypatch.setenv("FLEXJUDGE_BACKEND", "triton")
    layer = "model.layers.0.self_attn."
    names, sizes = [layer + kind for kind in ("q_proj", "k_proj", "v_proj")], [128, 32, 32]
    cpu = torch.device("cpu")
    linear = TensorLoader(open_checkpoint(folder), torch.float32, cpu).linear(names, sizes, 128, False)
    want = torch.cat([open_checkpoint(dense).tensor(n + ".weight").to_dense(torch.float32) for n in names])
    (matrix,) = linear.matrices
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(1))
    bar = 1e-5
    if name in W8:
        assert isinstance(matrix, W8Matrix)
        assert torch.equal(dequantize_w8(matrix), want)
        bar = 0.06 if name == "fp8" else 0.02  # activations have 8 bits
    elif name in NEEDS_PACKAGE:
        assert isinstance(matrix, DenseTensor)
        bar = 0.01
    elif name.endswith("-8") or name == "packed-rows":  # 8 bits, and scales of float32
        assert isinstance(matrix, QuantTensor)
    else:
        assert isinstance(matrix, W4Matrix)
        assert torch.equal(dequantize_w4(matrix), want)
    expected = x.double() @ want.double().T
    assert (linear(x) - expected).norm() < bar * expected.norm()


def test_a_cpu_keeps_weights_quantised(pair: tuple[str, Path, Path]) -> None:
    name, folder, _ = pair
    loader = TensorLoader(open_checkpoint(folder), torch.float32, torch.device("cpu"), merge=False)
    weight = loader.weight(NAME + ".weight", (128, 256))
    sizes = {"gptq": "32", "gptq-asymmetric": "64", "awq": "64", "packed": "32"}
    expected = "" if name in NEEDS_PACKAGE else W8.get(name, f"Z4_{sizes.get(name, '128')}")
    expected = "Z8_32" if name.endswith("-8") else expected
    assert (weight.format.name if isinstance(weight, QuantTensor) else "") == expected


def test_float8_on_a_gpu_that_has_none(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXJUDGE_BACKEND", "triton")
    monkeypatch.setattr("flexjudge_fast.kernels.quantize_tokens.capability", lambda: 86)
    for name, kind in (("fp8", DenseTensor), ("int8", W8Matrix)):
        folder, _ = publish(source, tmp_path, LAYOUTS[name])
        loader = TensorLoader(open_checkpoint(folder), torch.float32, torch.device("cpu"))
        assert [type(m) for m in loader.linear([NAME], [128], 256, False).matrices] == [kind]


def test_info_and_quantize(pair: tuple[str, Path, Path], tmp_path: Path) -> None:
    name, folder, _ = pair
    shown = CliRunner().invoke(app, ["info", str(folder), "--json"])
    assert shown.exit_code == 0
    config = LAYOUTS[name].config
    assert json.loads(shown.stdout)["weights"].startswith(
        config.get("checkpoint_format", config["quant_method"])
    )
    out = tmp_path / "kept"
    kept = CliRunner().invoke(app, ["quantize", str(folder), str(out), "--to", "keep"])
    if name in W8:
        assert kept.exit_code == 2 and "activations" in kept.stderr and not out.exists()
        return
    assert kept.exit_code == 0
    one, two = open_checkpoint(folder), open_checkpoint(out)
    for tensor in one.tensor_names():
        first, second = (c.tensor(tensor).to_dense(torch.float32) for c in (one, two))
        assert torch.equal(first, second)
    if name not in NEEDS_PACKAGE:
        again = CliRunner().invoke(app, ["quantize", str(folder), str(tmp_path / "two"), "--to", "int8"])
        assert again.exit_code == 2 and "quantised already" in again.stderr
        with pytest.raises(InvalidArgumentError, match="quantised already"):
            Engine.from_pretrained(folder, device="cpu", quantization="int8")


def test_expanding_everything(source: Path, tmp_path: Path) -> None:
    folder, dense = publish(source, tmp_path, LAYOUTS["awq"])
    checkpoint = open_checkpoint(folder)
    loader = TensorLoader(checkpoint, torch.float16, torch.device("cpu"), expand=True)
    weight = loader.weight(NAME + ".weight", (128, 256))
    want = load_file(dense / "model.safetensors")[NAME + ".weight"]
    assert isinstance(weight, DenseTensor) and torch.equal(weight.data, want.half())


def test_shards_bias_and_a_quantised_head(source: Path, tmp_path: Path) -> None:
    """An LM head in the layout, biases beside it, and an index over two files."""
    layout = LAYOUTS["gptq-v2"]
    folder, dense = publish(source, tmp_path, layout)
    tensors, plain = (load_file(p / "model.safetensors") for p in (folder, dense))
    plain["lm_head.weight"], parts = layout.write(tensors.pop("lm_head.weight"), **layout.arguments)
    tensors |= {f"lm_head.{part}": data for part, data in parts.items()}
    edit_config(folder, quantization_config={**layout.config, "lm_head": True})
    save(dense, plain)
    halves = [dict(sorted(tensors.items())[i::2]) for i in range(2)]
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for i, half in enumerate(halves):
        save(folder, half)
        (folder / "model.safetensors").rename(folder / f"part{i}.safetensors")
        weight_map |= dict.fromkeys(half, f"part{i}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    head = open_checkpoint(folder).tensor("lm_head.weight")
    assert isinstance(head, QuantTensor) and head.format.name == "Z4_128"
    assert (run(folder)[0] - run(dense)[0]).abs().max() < 2e-3


def test_what_to_install_is_said(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    folder, _ = publish(source, tmp_path, LAYOUTS["bnb-int8"])
    with pytest.raises(UnsupportedCheckpointError, match=r'pip install "flexjudge_fast\[bitsandbytes\]"'):
        open_checkpoint(folder).tensor(NAME + ".weight")


@pytest.mark.parametrize(
    ("name", "chosen"),
    [
        ("gptq", r"model\.layers.*_proj\.weight"),
        ("int8", r".*_proj\.weight"),
        ("fp8", r".*(_proj|qkv)\.weight"),
    ],
)
def test_vision_language(tmp_path: Path, name: str, chosen: str) -> None:
    """A tower that is left dense, and towers that are not, whose weights are expanded."""
    write_vision_checkpoint(tmp_path / "source")
    picture = Image.linear_gradient("L").resize((56, 84)).convert("RGB")
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "What?"}]
    found = []
    for folder in publish(tmp_path / "source", tmp_path, LAYOUTS[name], chosen):
        engine = Engine.from_pretrained(folder, dtype="float32", device="cpu", kv_cache_memory="16MiB")
        found.append(engine.logits([{"role": "user", "content": content}]))
        engine.close()
    assert (found[0] - found[1]).abs().max() < 5e-3
