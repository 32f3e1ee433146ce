"""Published layouts that ask for something else, or whose tensors are not what they say: typed errors."""

import copy
import importlib.util
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from flexjudge_fast import Engine
from flexjudge_fast.errors import CheckpointError, UnsupportedCheckpointError
from flexjudge_fast.models.loader import TensorLoader
from flexjudge_fast.weights.checkpoint import open_checkpoint
from tests.models import write_checkpoint
from tests.published import LAYOUTS, edit_config, publish, save

MODULE = "model.layers.1.mlp.down_proj"
GROUP = "config_groups.group_0."
WEIGHTS, INPUTS = GROUP + "weights.", GROUP + "input_activations."


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Made when asked for: a folder per layout."""
    source = tmp_path_factory.mktemp("source")
    write_checkpoint(source, heads=(8, 2), intermediate=256, seed=5)

    class Folders(dict[str, Path]):
        def __missing__(self, name: str) -> Path:
            if name in ("nf4", "nf4-nested", "fp4") and importlib.util.find_spec("bitsandbytes") is None:
                pytest.skip("bitsandbytes is not installed")
            self[name] = publish(source, tmp_path_factory.mktemp("published"), LAYOUTS[name])[0]
            return self[name]

    return Folders()


def with_field(folder: Path, target: Path, field: str, value: Any) -> Path:
    """A folder of the same config with one field of quantization_config set, by a dotted name."""
    target.mkdir()
    config = copy.deepcopy(json.loads((folder / "config.json").read_text()))
    *way, last = field.split(".")
    place = config["quantization_config"]
    for name in way:
        place = place.setdefault(name, {})
    place[last] = value
    (target / "config.json").write_text(json.dumps(config))
    (target / "model.safetensors").symlink_to(folder / "model.safetensors")
    return target


@pytest.mark.parametrize(
    ("layout", "field", "value"),
    [
        ("gptq", "bits", 3),
        ("gptq", "bits", True),
        ("gptq", "bits", None),
        ("gptq", "group_size", 48),
        ("gptq", "group_size", 0),
        ("gptq", "group_size", "128"),
        ("gptq", "checkpoint_format", "marlin"),
        ("gptq", "format", "gptq_v2"),
        ("gptq", "pack_dtype", "int64"),
        ("gptq", "is_marlin_format", True),
        ("gptq", "dynamic", {"model.layers.0": {"bits": 8}}),
        ("gptq", "rotation", "hadamard"),
        ("gptq", "adapter", {"name": "lora"}),
        ("gptq", "some_new_maths", 3),
        ("gptq", "some_new_maths", 0),
        ("awq", "bits", 8),
        ("awq", "group_size", 16),
        ("awq", "version", "gemv"),
        ("awq", "zero_point", False),
        ("awq", "backend", "llm-awq"),
        ("awq", "modules_to_not_convert", "lm_head"),
        ("awq", "some_new_maths", [1]),
        ("packed", "format", "marlin-24"),
        ("packed", "format", "nvfp4-pack-quantized"),
        ("packed", "quantization_status", "initialized"),
        ("packed", "kv_cache_scheme", {"num_bits": 8}),
        ("packed", "sparsity_config", {"format": "sparse-24-bitmask"}),
        ("packed", "transform_config", {"config_groups": {"R1": {}}}),
        ("packed", "config_groups", {}),
        ("packed", "config_groups", {"W4A16": ["Linear"]}),
        ("packed", "config_groups.other", {"weights": {"num_bits": 8, "strategy": "channel"}}),
        ("packed", "ignore", "lm_head"),
        ("packed", GROUP + "targets", "Linear"),
        ("packed", GROUP + "input_activations", {"num_bits": 8}),
        ("packed", GROUP + "output_activations", {"num_bits": 8}),
        ("packed", GROUP + "format", "int-quantized"),
        ("packed", WEIGHTS + "num_bits", 2),
        ("packed", WEIGHTS + "type", "float"),
        ("packed", WEIGHTS + "symmetric", "yes"),
        ("packed", WEIGHTS + "strategy", "block"),
        ("packed", WEIGHTS + "group_size", 40),
        ("packed", WEIGHTS + "strategy", "channel"),
        ("packed", WEIGHTS + "actorder", "group"),
        ("packed", WEIGHTS + "dynamic", True),
        ("packed", WEIGHTS + "block_structure", [128, 128]),
        ("int8", WEIGHTS + "num_bits", 4),
        ("int8", WEIGHTS + "symmetric", False),
        ("int8", WEIGHTS + "strategy", "group"),
        ("int8", GROUP + "input_activations", None),
        ("int8", INPUTS + "dynamic", False),
        ("int8", INPUTS + "strategy", "tensor"),
        ("int8", INPUTS + "symmetric", False),
        ("int8", INPUTS + "type", "float"),
        ("fp8", WEIGHTS + "type", "int"),
        ("fp8", WEIGHTS + "block_structure", [128, 128]),
        ("nf4", "load_in_8bit", True),
        ("nf4", "load_in_4bit", False),
        ("nf4", "bnb_4bit_quant_storage", "bfloat16"),
        ("nf4", "some_new_maths", "x"),
    ],
)
def test_fields(folders: dict[str, Path], tmp_path: Path, layout: str, field: str, value: Any) -> None:
    folder = with_field(folders[layout], tmp_path / "broken", field, value)
    name = field.split(".")[-1] if field != "config_groups.other" else "config_groups"
    name = "config_groups" if value == {"W4A16": ["Linear"]} else name
    name = "group_size" if (field, value) == (WEIGHTS + "strategy", "channel") else name
    name = "load_in" if name.startswith("load_in") else name
    with pytest.raises(UnsupportedCheckpointError, match=rf"config\.json: quantization_config.*{name}"):
        open_checkpoint(folder)


def test_order_that_nothing_tells(folders: dict[str, Path], tmp_path: Path) -> None:
    """desc_act, and no g_idx: columns may be in any order."""
    folder = with_field(folders["gptq"], tmp_path / "broken", "desc_act", True)
    open_checkpoint(folder).tensor(MODULE + ".weight")  # its g_idx says that they are in order
    folder = rewrite(folder, tmp_path / "without", "g_idx", None)
    with pytest.raises(CheckpointError, match=r"g_idx is missing, and desc_act is true"):
        open_checkpoint(folder).tensor(MODULE + ".weight")


def test_float8_that_float16_does_not_hold(folders: dict[str, Path], tmp_path: Path) -> None:
    """Finite as it is stored, infinite once it is expanded."""
    folder = rewrite(folders["fp8"], tmp_path / "broken", "weight_scale", lambda t: torch.full_like(t, 1e4))
    load = TensorLoader(open_checkpoint(folder), torch.float16, torch.device("cpu"))
    with pytest.raises(CheckpointError, match=r"down_proj.weight has values that torch\.float16 does not"):
        load.weight(MODULE + ".weight", (128, 256))


def test_other_methods_are_refused_by_the_engine(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = with_field(folders["gptq"], tmp_path / "broken", "quant_method", "hqq")
    with pytest.raises(UnsupportedCheckpointError, match="quantization_config: 'hqq'"):
        Engine.from_pretrained(folder)


def bad_index(good: torch.Tensor) -> torch.Tensor:
    return good.flip(0)


def bad_zeros(good: torch.Tensor) -> torch.Tensor:
    return torch.full_like(good, -1)  # 15 in every place


@pytest.mark.parametrize(
    ("layout", "part", "change", "error"),
    [
        ("gptq", "qweight", None, r"qweight is missing"),
        ("gptq", "qzeros", None, r"qzeros is missing"),
        ("gptq", "scales", None, r"scales is missing"),
        ("gptq", "qweight", torch.Tensor.long, r"qweight is torch\.int64"),
        ("gptq", "qweight", lambda t: t[:, :60], r"qweight has 60 output features"),
        ("gptq", "qweight", lambda t: t[:3], r"qweight has 24 columns"),
        ("gptq", "qweight", lambda t: t[:0], r"qweight has 0 columns"),
        ("gptq", "qzeros", lambda t: t[1:], r"qzeros has shape \(7, 16\), \[8, 16\] is expected"),
        ("gptq", "qzeros", bad_zeros, r"qzeros holds zero points of 0"),
        ("gptq", "scales", lambda t: t[0], r"scales has shape \(128,\)"),
        ("gptq", "scales", lambda t: t.double(), r"scales is torch\.float64"),
        ("gptq", "g_idx", bad_index, r"g_idx is not in the order of the columns \(desc_act\)"),
        ("gptq", "g_idx", lambda t: t[1:], r"g_idx has shape"),
        ("gptq", "weight", lambda t: torch.zeros(128, 256), r"weight is there beside"),
        ("awq", "qweight", None, r"qweight is missing"),
        ("awq", "qweight", lambda t: t[:100], r"qweight has 100 columns"),
        ("awq", "qzeros", lambda t: t.T, r"qzeros has shape"),
        ("awq", "scales", lambda t: t[:, 1:], r"scales has shape"),
        ("packed", "weight_packed", None, r"weight_packed is missing"),
        ("packed", "weight_scale", None, r"weight_scale is missing"),
        ("packed", "weight_shape", None, r"weight_shape is missing"),
        ("packed", "weight_shape", lambda t: torch.tensor([128, 1 << 40]), r"weight_packed has shape"),
        ("packed", "weight_shape", lambda t: torch.tensor([-128, 256]), r"weight_shape is \[-128"),
        ("packed", "weight_shape", lambda t: torch.tensor([128, 250]), r"has 250 columns"),
        ("packed", "weight_zero_point", lambda t: torch.ones(128, 8, dtype=torch.int8), r"is not zero"),
        ("packed", "weight_g_idx", lambda t: torch.arange(256).flip(0), r"weight_g_idx is not in the order"),
        ("packed-asymmetric", "weight_zero_point", None, r"weight_zero_point is missing"),
        ("packed-asymmetric", "weight_zero_point", lambda t: t[1:], r"weight_zero_point has shape"),
        (
            "packed-asymmetric",
            "weight_zero_point",
            lambda t: torch.full((128, 2), 9, dtype=torch.int8),
            r"beyond 4 bits",
        ),
        ("int8", "weight_scale", None, r"weight is torch\.int8"),
        ("int8", "weight", None, r"weight is missing"),
        ("int8", "weight", lambda t: t.float(), r"weight is torch\.float32"),
        ("int8", "weight_scale", lambda t: t[:5], r"weight_scale has shape"),
        ("int8", "weight_zero_point", lambda t: torch.ones(128, 1, dtype=torch.int8), r"is not zero"),
        ("fp8", "weight_scale", None, r"weight is torch\.float8_e4m3fn"),
        ("fp8", "weight", lambda t: t.float().to(torch.float8_e5m2), r"weight is torch\.float8_e5m2"),
        ("bnb-int8", "SCB", None, r"SCB is missing"),
        ("bnb-int8", "SCB", lambda t: t[1:], r"SCB has shape"),
        ("bnb-int8", "weight_format", lambda t: t + 1, r"weight_format is not 0"),
        ("nf4", "weight", None, r"weight is missing"),
        ("nf4", "weight", lambda t: t[1:], r"weight has shape"),
        ("nf4", "weight.absmax", None, r"weight\.absmax is missing"),
        ("nf4", "weight.absmax", lambda t: t[1:], r"weight\.absmax has shape"),
        ("nf4", "weight.absmax", lambda t: t.to(torch.uint8), r"weight\.absmax is torch\.uint8"),
        ("nf4", "weight.quant_map", lambda t: t[1:], r"weight\.quant_map has shape"),
        ("nf4-nested", "weight.nested_absmax", lambda t: t[1:], r"nested_absmax has shape"),
        ("nf4-nested", "weight.nested_quant_map", lambda t: t[:16], r"nested_quant_map has shape"),
        ("nf4-nested", "weight.nested_quant_map", None, r"nested_quant_map is missing"),
    ],
)
def test_tensors(
    folders: dict[str, Path], tmp_path: Path, layout: str, part: str, change: Any, error: str
) -> None:
    folder = rewrite(folders[layout], tmp_path / "broken", part, change)
    if layout == "bnb-int8" and "format" in part and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    with pytest.raises(CheckpointError, match=rf"{MODULE}\.[\w.]*.*{error}"):
        open_checkpoint(folder).tensor(MODULE + ".weight")


def rewrite(folder: Path, target: Path, part: str, change: Any) -> Path:
    """A folder with one tensor of `MODULE` changed, made, or (`None`) left out."""
    target.mkdir()
    tensors = load_file(folder / "model.safetensors")
    name = f"{MODULE}.{part}"
    old = tensors.pop(name, torch.zeros(1))
    if change is not None:
        tensors[name] = change(old)
    save(target, tensors)
    (target / "config.json").write_text((folder / "config.json").read_text())
    return target


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("blocksize", 63, r"blocksize: 63"),
        ("blocksize", 32, r"absmax has shape"),
        ("shape", [128, 1 << 40], r"weight has shape"),
        ("shape", [128], r"shape: \[128\]"),
        ("shape", [-128, -256], r"shape: \[-128"),
        ("shape", None, r"shape: None"),
        ("dtype", "float64", r"dtype: 'float64'"),
        ("dtype", "__class__", r"dtype: '__class__'"),
        ("quant_type", "fp4", r"quant_type: 'fp4'"),
        ("nested_blocksize", 7, r"nested_blocksize: 7"),
        ("nested_blocksize", 64, r"nested_absmax has shape"),
        ("nested_dtype", "bfloat16", r"nested_dtype: 'bfloat16'"),
        ("nested_offset", "1", r"nested_offset: '1'"),
        ("nested_offset", 10**400, r"nested_offset: 1000"),
        ("other", 1, r"other: 1, the field is unknown"),
        ("", b"[" * 3000, r"is no JSON"),
        ("", b"[1]", r"an object is expected"),
        ("", b" " * 5000, r"has 5000 bytes"),
    ],
)
def test_states_of_bitsandbytes(
    folders: dict[str, Path], tmp_path: Path, field: str, value: Any, error: str
) -> None:
    """What its compiled code would trust is checked before."""
    state = "weight.quant_state.bitsandbytes__nf4"

    def change(old: torch.Tensor) -> torch.Tensor:
        data = value if not field else json.dumps({**json.loads(bytes(old.tolist())), field: value}).encode()
        return torch.tensor(list(data), dtype=torch.uint8)

    folder = rewrite(folders["nf4-nested"], tmp_path / "broken", state, change)
    with pytest.raises(CheckpointError, match=error):
        open_checkpoint(folder).tensor(MODULE + ".weight")


def test_scales_must_be_finite(folders: dict[str, Path], tmp_path: Path) -> None:
    def change(old: torch.Tensor) -> torch.Tensor:
        old[1, 1] = torch.inf
        return old

    folder = rewrite(folders["gptq"], tmp_path / "broken", "scales", change)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).symlink_to(folders["gptq"] / name)
    with pytest.raises(CheckpointError, match=rf"{MODULE}\.weight holds NaN or infinite"):
        Engine.from_pretrained(folder, device="cpu")


@pytest.mark.parametrize(("layout", "field"), [("awq", "modules_to_not_convert"), ("packed", "ignore")])
def test_a_module_that_is_said_to_be_dense(
    folders: dict[str, Path], tmp_path: Path, layout: str, field: str
) -> None:
    folder = with_field(folders[layout], tmp_path / "broken", field, [MODULE])
    with pytest.raises(CheckpointError, match=f"module {MODULE} is quantised"):
        open_checkpoint(folder)


def test_patterns_are_not_run(folders: dict[str, Path], tmp_path: Path) -> None:
    """This one would take longer than anyone waits."""
    value = ["lm_head", "re:(([a-z0-9._]+)+)+!"]
    open_checkpoint(with_field(folders["packed"], tmp_path / "slow", "ignore", value))


def test_a_config_that_lies_about_groups(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = with_field(folders["gptq"], tmp_path / "broken", "group_size", 64)
    with pytest.raises(CheckpointError, match=r"g_idx is not in the order|qzeros has shape"):
        open_checkpoint(folder).tensor(MODULE + ".weight")


def test_only_known_layouts_are_wrapped(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = with_field(folders["gptq"], tmp_path / "other", "quant_method", ["gptq"])
    assert open_checkpoint(folder).config["quantization_config"]["quant_method"] == ["gptq"]
    edit_config(folder, quantization_config="gptq")
    assert open_checkpoint(folder).config["quantization_config"] == "gptq"


def damaged(tensor: torch.Tensor, pick: random.Random) -> torch.Tensor | None:
    """Another size, another dtype, other bytes, or nothing."""
    kind = pick.randrange(6)
    if kind == 0:
        return None
    if kind == 1:
        return tensor.flatten()[: pick.randrange(tensor.numel() + 1)]
    if kind == 2:
        return tensor.unsqueeze(0) if tensor.dim() < 2 else tensor.T
    if kind == 3:
        return tensor[pick.randrange(-2, 3) :] if tensor.dim() else tensor.reshape(1)
    if kind == 4:
        return tensor.float().to(pick.choice([torch.bool, torch.int16, torch.uint8, torch.float8_e5m2]))
    data = bytes(pick.randrange(256) for _ in range(tensor.nbytes))
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(tensor.dtype).reshape(tensor.shape)


@pytest.mark.parametrize(
    "layout", ["gptq", "awq", "packed-asymmetric", "int8", "fp8", "bnb-int8", "nf4-nested"]
)
def test_any_damage_is_a_typed_error(folders: dict[str, Path], tmp_path: Path, layout: str) -> None:
    """Or none at all, where other numbers are as good."""
    if layout == "bnb-int8" and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    folder, pick, refused = folders[layout], random.Random(layout), 0
    tensors = load_file(folder / "model.safetensors")
    parts = {name: data for name, data in tensors.items() if name.startswith(MODULE)}
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    for _ in range(60):
        name = pick.choice(sorted(parts))
        bad = damaged(parts[name], pick)
        save(tmp_path, {other: data for other, data in {**parts, name: bad}.items() if data is not None})
        try:
            weight = open_checkpoint(tmp_path).tensor(MODULE + ".weight")
            assert weight.is_finite() in (True, False)
            weight.to_dense(torch.float32)
        except CheckpointError as error:
            assert MODULE in str(error)
            refused += 1
    assert refused > 20
