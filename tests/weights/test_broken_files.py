"""Damaged checkpoints: a typed error that names the file or tensor, whatever byte is wrong."""

import json
import random

import pytest
import torch

from flexjudge_fast import CheckpointError, Engine, FlexJudgeError, UnsupportedCheckpointError
from flexjudge_fast.weights.checkpoint import open_checkpoint
from tests.models import write_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights")
    write_checkpoint(path, shard="100KB")
    return path


@pytest.fixture(scope="module")
def small_gguf(tmp_path_factory):
    """A tiny llama GGUF, written by the gguf package."""
    import gguf
    import numpy as np

    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    tokens = [*(chr(i) for i in range(33, 64)), "!!"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 29 + [3, 3, 1])
    writer.add_token_merges(["! !"])
    writer.add_eos_token_id(30)
    rng = np.random.default_rng(0)
    shapes = {"token_embd": (32, 32), "output_norm": (32,), "blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,)}
    shapes |= {f"blk.0.{n}": (32, 32) for n in ("attn_q", "attn_k", "attn_v", "attn_output")}
    shapes |= {f"blk.0.{n}": (32, 32) for n in ("ffn_gate", "ffn_up", "ffn_down")}
    for name, shape in shapes.items():
        data = rng.normal(size=shape).astype(np.float32) * 0.1
        kind = gguf.GGMLQuantizationType.Q8_0 if len(shape) == 2 else None
        stored = data if kind is None else gguf.quants.quantize(data, kind)
        writer.add_tensor(name + ".weight", stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def load_all(path):
    """Everything that a loader does with a file."""
    checkpoint = open_checkpoint(path)
    for name in checkpoint.tensor_names():
        checkpoint.tensor(name).to_dense(torch.float32)
    checkpoint.tokenizer_json()
    Engine.from_pretrained(path, kv_cache_memory="1MiB")


def check_damaged(path):
    try:
        load_all(path)
    except FlexJudgeError as error:
        assert str(error)


@pytest.mark.filterwarnings("ignore")
def test_mutated_gguf(small_gguf, tmp_path):
    whole = small_gguf.read_bytes()
    load_all(small_gguf)
    rng = random.Random(0)
    target = tmp_path / "m.gguf"
    for _ in range(250):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 1, 4, 16))):
            data[rng.randrange(min(len(data), 2500))] = rng.choice(
                (0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256))
            )
        target.write_bytes(data)
        check_damaged(target)


@pytest.mark.filterwarnings("ignore")
def test_truncated_gguf(small_gguf, tmp_path):
    whole = small_gguf.read_bytes()
    target = tmp_path / "t.gguf"
    for length in [*range(0, 200, 7), *range(200, len(whole), 997), len(whole) - 1]:
        target.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"t\.gguf"):
            load_all(target)


def test_mutated_safetensors(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    shard = sorted(tmp_path.glob("*.safetensors"))[0]
    whole = shard.read_bytes()
    rng = random.Random(1)
    for _ in range(120):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 4))):
            data[rng.randrange(600)] = rng.choice((0, 0x22, 0x7F, 0xFF, rng.randrange(256)))
        shard.write_bytes(data[: rng.choice((len(data), rng.randrange(len(data))))])
        check_damaged(tmp_path)


def test_named_mistakes(folder, tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="neither safetensors"):
        open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(CheckpointError, match="pickled"):
        open_checkpoint(tmp_path)
    (tmp_path / "x.gguf").write_bytes(b"NOPE" * 10)
    with pytest.raises(CheckpointError, match="not a GGUF"):
        open_checkpoint(tmp_path / "x.gguf")


def test_index_is_checked(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    index = tmp_path / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    first = next(iter(whole["weight_map"]))
    for change, message in [
        ({first: "../../etc/passwd.safetensors"}, "not a plain"),
        ({first: "gone.safetensors"}, "shard is missing"),
        ({"model.extra.weight": whole["weight_map"][first]}, "model.extra.weight"),
    ]:
        index.write_text(json.dumps({"weight_map": {**whole["weight_map"], **change}}))
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(tmp_path)


def test_offline_hub(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match="nobody/nothing"):
        open_checkpoint("nobody/nothing")


def test_unknown_gguf_architecture(small_gguf, tmp_path):
    target = tmp_path / "a.gguf"
    target.write_bytes(small_gguf.read_bytes().replace(b"llama", b"mamba"))
    with pytest.raises(UnsupportedCheckpointError, match="mamba"):
        open_checkpoint(target)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_any_float_dtype(folder, tmp_path, dtype):
    from safetensors.torch import load_file, save_file

    for path in folder.iterdir():
        if not path.name.startswith("model"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = {}
    for shard in folder.glob("*.safetensors"):
        tensors |= load_file(shard)
    save_file({name: t.to(dtype) for name, t in tensors.items()}, tmp_path / "model.safetensors")
    engine = Engine.from_pretrained(tmp_path, dtype="float32", kv_cache_memory="4MiB")
    assert engine.logits([1, 2, 3]).isfinite().all()


def test_the_hash_is_the_files_own(small_gguf):
    import hashlib

    want = "sha256:" + hashlib.sha256(small_gguf.read_bytes()).hexdigest()
    assert open_checkpoint(small_gguf).weights_hash() == want
