"""A folder's small files: where the chat template may be, and names that lead out of the folder."""

import json
import sys

import pytest
import torch
from safetensors.torch import save_file

from flexjudge_fast.errors import CheckpointError, UnsupportedCheckpointError
from flexjudge_fast.weights.checkpoint import open_checkpoint
from tests.models import UNREADABLE


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    ("files", "want"),
    [
        ({}, None),
        ({"tokenizer_config.json": {"chat_template": "T"}}, "T"),
        (
            {"tokenizer_config.json": {"chat_template": "T"}, "chat_template.json": {"chat_template": "J"}},
            "J",
        ),
        ({"chat_template.jinja": "F", "chat_template.json": {"chat_template": "J"}}, "F"),
        ({"tokenizer_config.json": {"chat_template": [{"name": "default", "template": "D"}]}}, "D"),
        ({"tokenizer_config.json": {"chat_template": ["x", 3, None]}}, None),
        ({"tokenizer_config.json": {"chat_template": 3}}, None),
    ],
)
def test_chat_template(folder, files, want):
    for name, content in files.items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    assert open_checkpoint(folder).tokenizer_config["chat_template"] == want


SHARDS = [
    "/etc/x.safetensors",
    "../x.safetensors",
    "..\\x.safetensors",
    "x\0.safetensors",
    "\ud800.safetensors",
]


@pytest.mark.parametrize("shard", [*SHARDS, ".safetensors", "x.bin", 3, None])
def test_shard_names(folder, shard):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(CheckpointError, match="not a plain") as caught:
        open_checkpoint(folder)
    assert str(caught.value).isprintable()


def test_integers_are_no_weights(folder):
    save_file({"a": torch.ones(2, dtype=torch.int8)}, folder / "model.safetensors")
    with pytest.raises(UnsupportedCheckpointError, match=r"tensor a is torch\.int8"):
        open_checkpoint(folder).tensor("a")


def test_nothing_of_a_checkpoint_is_executed(folder):
    """Neither its Python files nor its pickles, and the folder does not become importable."""
    (folder / "modeling_evil.py").write_text("raise SystemExit('executed')")
    (folder / "pytorch_model.bin").write_bytes(b"cos\nabort\n(tR.")
    (folder / "config.json").write_text(json.dumps({"auto_map": {"AutoModel": "modeling_evil.Evil"}}))
    before = list(sys.path)
    checkpoint = open_checkpoint(folder)
    assert list(checkpoint.tensor_names()) == ["a"]
    assert sys.path == before
    assert "modeling_evil" not in sys.modules


OLD = {"preprocessor_config.json": {"own": 1}, "video_preprocessor_config.json": {"own": 2}}
NEW = {"image_processor": {"own": 3}, "video_processor": {"own": 4}, "feature_extractor": {"own": 5}}
PLACES = ("preprocessor_config.json", "video_preprocessor_config.json", "preprocessor_config.json")


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ({}, (1, 2, 1)),
        (NEW, (3, 4, 5)),
        ({"processor_class": "X", "image_processor": NEW["image_processor"]}, (3, 2, 1)),
        ({"audio_processor": {"own": 6}, "video_processor": None}, (1, 2, 6)),
    ],
)
def test_where_processors_are_read_from(folder, given, want):
    """Each kind of media its own settings, as transformers 5 writes them, else from the older file."""
    for name, content in {**OLD, "processor_config.json": given}.items():
        (folder / name).write_text(json.dumps(content))
    found = [open_checkpoint(folder).processor_config(kind) for kind in ("image", "video", "audio")]
    assert tuple(config.fields["own"] for config in found) == want
    for config, old, number in zip(found, PLACES, want, strict=True):
        assert config.where == old if number < 3 else config.where.startswith("processor_config.json, ")


@pytest.mark.parametrize("kind", ["image", "video", "audio"])
@pytest.mark.parametrize("value", [3, "x", [], ""])
def test_a_processor_is_an_object(folder, kind, value):
    (folder / "processor_config.json").write_text(json.dumps(dict.fromkeys(NEW, value)))
    with pytest.raises(CheckpointError, match=r"processor_config\.json: \w+ must be an object"):
        open_checkpoint(folder).processor_config(kind)


def write_shards(folder, shards):
    """Files `0.safetensors` and so on, and the index that names their tensors."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    names = {}
    for number, tensors in enumerate(shards):
        save_file(tensors, folder / f"{number}.safetensors")
        names |= dict.fromkeys(tensors, f"{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


READ = {"thinker.a": torch.ones(2), "thinker.b": torch.zeros(3)}


def test_files_of_a_talker_alone_need_not_be_there(folder):
    write_shards(folder, [READ, UNREADABLE])
    whole = open_checkpoint(folder)
    found = whole.weights_hash()
    assert list(whole.tensor_names()) == list(READ)
    assert whole.weight_files() == [folder / "0.safetensors"]
    with pytest.raises(CheckpointError, match=r"tensor talker\.model\.norm\.weight is missing"):
        whole.tensor("talker.model.norm.weight")
    for change in (lambda path: path.write_bytes(b"junk"), lambda path: path.unlink()):
        change(folder / "1.safetensors")
        assert open_checkpoint(folder).weights_hash() == found
    (folder / "0.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"0\.safetensors: the shard is missing"):
        open_checkpoint(folder)


def test_a_file_of_both_counts_with_all_its_bytes(folder):
    first, second = ({name: READ[name]} for name in READ)
    write_shards(folder, [first, second | UNREADABLE])
    mixed = open_checkpoint(folder)
    assert [path.name for path in mixed.weight_files()] == ["0.safetensors", "1.safetensors"]
    found = mixed.weights_hash()
    write_shards(folder, [first, second])
    assert open_checkpoint(folder).weights_hash() != found
    (folder / "1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"1\.safetensors: the shard is missing"):
        open_checkpoint(folder)


def test_without_an_index_files_tell_what_they_hold(folder):
    write_shards(folder, [READ, UNREADABLE])
    (folder / "model.safetensors.index.json").unlink()
    checkpoint = open_checkpoint(folder)
    assert list(checkpoint.tensor_names()) == list(READ)
    assert checkpoint.weight_files() == [folder / "0.safetensors"]


def test_names_of_files_that_are_not_read_are_checked_too(folder):
    write_shards(folder, [READ])
    names = {**dict.fromkeys(READ, "0.safetensors"), "talker.x": "../x.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(CheckpointError, match="not a plain"):
        open_checkpoint(folder)
