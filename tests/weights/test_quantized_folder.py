"""`flexjudge quantize`: the folder it writes, what loads from it, and what it refuses."""

import json
import shutil

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from flexjudge_fast import Engine, SamplingParams
from flexjudge_fast.errors import CheckpointError, InvalidArgumentError, UnsupportedCheckpointError
from flexjudge_fast.weights.checkpoint import open_checkpoint
from flexjudge_fast.weights.quantization import QUANTIZATIONS, find_quantization
from flexjudge_fast.weights.quantized_folder import write_folder
from flexjudge_fast.weights.tensor import QuantTensor
from tests.models import write_checkpoint, write_omni_checkpoint

PROMPTS = ["The quick brown fox", "0123", "x"]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """Rows of 128 and 256 columns: whole groups of every size."""
    folder = tmp_path_factory.mktemp("dense")
    write_checkpoint(folder, heads=(8, 2), intermediate=256, seed=5)
    return folder


def greedy(path, quantization=None):
    engine = Engine.from_pretrained(
        path, max_model_len=128, kv_cache_memory="64MiB", quantization=quantization
    )
    try:
        return [c.token_ids for c in engine.generate(PROMPTS, GREEDY)], engine.logits(PROMPTS[0])
    finally:
        engine.close()


@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_a_written_folder_gives_what_loading_gives(dense, tmp_path, name):
    out = tmp_path / "out"
    write_folder(open_checkpoint(dense), out, find_quantization(name))
    tokens, logits = greedy(out)
    want_tokens, want_logits = greedy(dense, name)
    assert tokens == want_tokens
    assert torch.equal(logits, want_logits)
    plain = greedy(dense)[1]
    assert not torch.equal(logits, plain)
    limit = 0.5 if name == "int8" else 5.0  # of logits some 3 apart; found: 0.27 and 2.6 to 3.9
    assert (logits - plain).abs().max() < limit


def test_what_is_quantised(dense, tmp_path):
    write_folder(open_checkpoint(dense), tmp_path / "out", find_quantization("int4-g128"))
    checkpoint = open_checkpoint(tmp_path / "out")
    kinds = {}
    for name in checkpoint.tensor_names():
        weight = checkpoint.tensor(name)
        kinds[name] = weight.format.name if isinstance(weight, QuantTensor) else "dense"
    assert kinds["model.embed_tokens.weight"] == kinds["lm_head.weight"] == "I8_32"
    assert {k for n, k in kinds.items() if n.endswith("_proj.weight")} == {"I4_128"}
    assert {k for n, k in kinds.items() if "norm" in n} == {"dense"}


def test_keep_writes_a_folder_in_the_same_formats(dense, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    write_folder(open_checkpoint(dense), first, find_quantization("int4"))
    write_folder(open_checkpoint(first), second, None)
    assert greedy(first)[0] == greedy(second)[0]
    (name,) = [p.name for p in first.glob("*.safetensors")]
    a, b = load_file(first / name), load_file(second / name)
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_existing_folders_and_own_sources_are_safe(dense, tmp_path):
    out, other = tmp_path / "out", tmp_path / "other"
    other.mkdir()
    (other / "precious").touch()
    out.mkdir()
    checkpoint = open_checkpoint(dense)
    with pytest.raises(InvalidArgumentError, match="exists already"):
        write_folder(checkpoint, out, None)
    with pytest.raises(InvalidArgumentError, match="only an empty folder"):
        write_folder(checkpoint, other, None, replace=True)
    assert (other / "precious").exists()
    for target in (dense, dense.parent):
        with pytest.raises(InvalidArgumentError, match="holds the checkpoint"):
            write_folder(checkpoint, target, None, replace=True)
    write_folder(checkpoint, out, None, replace=True)
    (out / "stale.txt").touch()
    write_folder(checkpoint, out, find_quantization("int8"), replace=True)
    assert not (out / "stale.txt").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "out"]


def test_a_source_called_as_the_folder_in_work(dense, tmp_path):
    source = tmp_path / "out.part"
    shutil.copytree(dense, source)
    write_folder(open_checkpoint(source), tmp_path / "out", None)
    assert (source / "config.json").exists()


@pytest.mark.parametrize("error", [OSError("no space left"), SafetensorError("I/O error")])
def test_a_full_disk(dense, tmp_path, monkeypatch, error):
    out = tmp_path / "out"
    write_folder(open_checkpoint(dense), out, None)

    def full(*_):
        raise error

    monkeypatch.setattr("flexjudge_fast.weights.quantized_folder.save_file", full)
    with pytest.raises(CheckpointError, match=r"no space left|I/O error"):
        write_folder(open_checkpoint(dense), out, None, replace=True)
    assert open_checkpoint(out).tensor_names()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_another_way_of_quantising_is_refused(dense, tmp_path):
    """Weights that need scales of their own must not be taken for plain ones."""
    source = tmp_path / "fp8"
    shutil.copytree(dense, source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "fp8"}})
    )
    with pytest.raises(UnsupportedCheckpointError, match="quantised already"):
        write_folder(open_checkpoint(source), tmp_path / "out", find_quantization("int8"))


def test_a_failed_run_leaves_nothing(dense, tmp_path):
    """Groups of 128 do not fit 96 columns: an error that names the tensor, and no half-written folder."""
    source = tmp_path / "odd"
    write_checkpoint(source)
    with pytest.raises(InvalidArgumentError, match=r"down_proj.* has 96 columns|_proj.*64 columns"):
        write_folder(open_checkpoint(source), tmp_path / "out", find_quantization("int4-g128"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["odd"]


def test_quantising_twice_is_refused(dense, tmp_path):
    write_folder(open_checkpoint(dense), tmp_path / "out", find_quantization("int4"))
    with pytest.raises(InvalidArgumentError, match="quantised already"):
        Engine.from_pretrained(tmp_path / "out", quantization="int8")


def test_nan_is_refused(dense, tmp_path):
    source = tmp_path / "nan"
    write_checkpoint(source, heads=(8, 2), intermediate=256)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"up_proj\.weight holds NaN"):
        write_folder(open_checkpoint(source), tmp_path / "out", find_quantization("int8"))


@pytest.mark.parametrize(
    ("formats", "error"),
    [
        ("{", CheckpointError),
        ("[1]", CheckpointError),
        ("{}", UnsupportedCheckpointError),
        ('{"NAME": 3}', UnsupportedCheckpointError),
        ('{"NAME": "Q99"}', UnsupportedCheckpointError),
        ('{"NAME": "Q6_K"}', CheckpointError),
    ],
)
def test_lying_metadata(dense, tmp_path, formats, error):
    out = tmp_path / "out"
    write_folder(open_checkpoint(dense), out, find_quantization("int4"))
    (path,) = out.glob("*.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(load_file(path), path, {"formats": formats.replace("NAME", name)})
    with pytest.raises(error, match=r"formats|format|cannot be|float type"):
        open_checkpoint(out).tensor(name)


def test_another_version_is_refused(dense, tmp_path):
    out = tmp_path / "out"
    write_folder(open_checkpoint(dense), out, find_quantization("int4"))
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["version"] = 99
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedCheckpointError, match="99"):
        Engine.from_pretrained(out)


def test_shards_are_indexed(dense, tmp_path, monkeypatch):
    monkeypatch.setattr("flexjudge_fast.weights.quantized_folder._SHARD_BYTES", 40_000)
    out = tmp_path / "out"
    write_folder(open_checkpoint(dense), out, find_quantization("int8"))
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 2
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    for path in files:
        with safe_open(path, framework="pt") as file:
            assert {index[name] for name in file.keys()} == {path.name}  # noqa: SIM118 - not a dict
    assert greedy(out)[0] == greedy(dense, "int8")[0]


@pytest.mark.parametrize("to", ["int8", "keep"])
def test_of_a_whole_omni_the_thinker_is_written(tmp_path, to):
    """Neither NaN nor integers of its talker and vocoder stop it, and the folder runs as the whole does."""
    source, out = tmp_path / "whole", tmp_path / "out"
    write_omni_checkpoint(source, whole=True, seed=6)
    write_folder(open_checkpoint(source), out, find_quantization(to))
    stored = {name for path in out.glob("*.safetensors") for name in load_file(path)}
    assert stored == set(open_checkpoint(source).tensor_names())
    assert stored and all(name.startswith("thinker.") for name in stored)
    tokens, logits = greedy(out)
    want_tokens, want_logits = greedy(source, None if to == "keep" else to)
    assert tokens == want_tokens and torch.equal(logits, want_logits)
