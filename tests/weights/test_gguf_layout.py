"""A GGUF file in the Hugging Face layout: config, names, row order; and headers that lie."""

import struct

import gguf
import numpy as np
import pytest
import torch

from flexjudge_fast.errors import CheckpointError, UnsupportedCheckpointError
from flexjudge_fast.weights.checkpoint import Checkpoint, open_checkpoint
from flexjudge_fast.weights.tensor import DenseTensor, QuantTensor

HIDDEN, HEADS, KV_HEADS = 32, 4, 2
Q8_0 = gguf.GGMLQuantizationType.Q8_0


def permuted(weight, heads):
    """Row order of llama.cpp's converter: rotary pairs side by side."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def weights(arch):
    """HF-ordered float weights by GGUF name."""
    rng = np.random.default_rng(0)
    kv_rows = HIDDEN // HEADS * KV_HEADS
    shapes = {"token_embd": (40, HIDDEN), "output_norm": (HIDDEN,), "blk.0.attn_norm": (HIDDEN,)}
    shapes |= {"blk.0.attn_q": (HIDDEN, HIDDEN), "blk.0.attn_k": (kv_rows, HIDDEN)}
    return {n: (rng.normal(size=s) * 0.1).astype(np.float32) for n, s in shapes.items()}


def write(path, arch="llama", quantised=True, extra=lambda writer: None):
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(48)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([chr(33 + i) for i in range(38)] + ["!!", "<end>"])
    writer.add_token_types([1] * 39 + [3])
    writer.add_token_merges(["! !"])
    writer.add_eos_token_id(39)
    writer.add_chat_template("{{ messages }}")
    for name, data in weights(arch).items():
        heads = {"blk.0.attn_q": HEADS, "blk.0.attn_k": KV_HEADS}.get(name)
        stored = permuted(data, heads) if arch == "llama" and heads else data
        if quantised and data.ndim == 2:
            writer.add_tensor(name + ".weight", gguf.quants.quantize(stored, Q8_0), raw_dtype=Q8_0)
        else:
            writer.add_tensor(name + ".weight", np.ascontiguousarray(stored))
    extra(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
@pytest.mark.parametrize("quantised", [True, False])
def test_rows_come_in_hf_order(tmp_path, arch, quantised):
    checkpoint = open_checkpoint(write(tmp_path / "m.gguf", arch, quantised))
    for ours, theirs in [("q_proj", "blk.0.attn_q"), ("k_proj", "blk.0.attn_k")]:
        weight = checkpoint.tensor(f"model.layers.0.self_attn.{ours}.weight")
        assert isinstance(weight, QuantTensor if quantised else DenseTensor)
        want = weights(arch)[theirs]
        if quantised:
            want = gguf.quants.dequantize(gguf.quants.quantize(want, Q8_0), Q8_0)
        assert torch.equal(weight.to_dense(torch.float32), torch.from_numpy(want))


def test_config_and_tokenizer_config(tmp_path):
    checkpoint = open_checkpoint(write(tmp_path / "m.gguf"))
    expected = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "max_position_embeddings": 64,
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": 40,
        "tie_word_embeddings": True,
        "eos_token_id": 39,
        "bos_token_id": None,
        "rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"},
    }
    assert {key: checkpoint.config[key] for key in expected} == expected
    assert checkpoint.tokenizer_config["chat_template"] == "{{ messages }}"
    assert checkpoint.tokenizer_config["eos_token"] == "<end>"
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is missing"):
        checkpoint.tensor("lm_head.weight")


def test_bf16_tensors(tmp_path):
    data = torch.randn(4, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    raw = data.view(torch.uint8).numpy()
    bf16 = gguf.GGMLQuantizationType.BF16
    path = write(tmp_path / "m.gguf", extra=lambda w: w.add_tensor("output.weight", raw, raw_dtype=bf16))
    assert torch.equal(open_checkpoint(path).tensor("lm_head.weight").to_dense(torch.bfloat16), data)


def test_rope_factors(tmp_path):
    factors = np.array([1, 1, 8, 32], dtype=np.float32)
    path = write(tmp_path / "m.gguf", extra=lambda w: w.add_tensor("rope_freqs.weight", factors))
    rope = open_checkpoint(path).config["rope_parameters"]
    assert (rope["rope_type"], rope["factors"]) == ("factors", [1, 1, 8, 32])


def replace_value(data, key, old, new):
    """Overwrite the `old` bytes that follow a metadata key or tensor name by `new` ones of that length."""
    start = data.index(key) + len(key)
    at = data.index(old, start)
    assert at - start <= 16
    assert len(old) == len(new)
    return data[:at] + new + data[at + len(old) :]


def u32(number):
    return struct.pack("<I", number)


def u64(number):
    return struct.pack("<Q", number)


HUGE = u64(1 << 60)
LIES = {
    "tensor count": (lambda d: d[:8] + HUGE + d[16:], "more than can be"),
    "key count": (lambda d: d[:16] + HUGE + d[24:], "more than can be"),
    "key length": (lambda d: d[:24] + u64(1 << 63) + d[32:], "more bytes at byte"),
    "strings": (lambda d: replace_value(d, b"ggml.tokens", u64(40), HUGE), "longer than can be"),
    "integers": (lambda d: replace_value(d, b"ggml.token_type", u64(40), HUGE), "longer than can be"),
    "longest": (
        lambda d: replace_value(d, b"ggml.token_type", u64(40), u64((1 << 64) - 1)),
        "longer than can be",
    ),
    "past the end": (
        lambda d: replace_value(d, b"ggml.token_type", u64(40), u64(1 << 20)),
        "more bytes at byte",
    ),
    "nested array": (
        lambda d: replace_value(d, b"ggml.tokens", u32(9) + u32(8), u32(9) + u32(9)),
        "array in an array",
    ),
    "no heads": (
        lambda d: replace_value(d, b"attention.head_count", u32(4) + u32(HEADS), u32(4) + u32(0)),
        "q_proj",
    ),
    "odd heads": (
        lambda d: replace_value(d, b"attention.head_count", u32(4) + u32(HEADS), u32(4) + u32(3)),
        "q_proj",
    ),
    "eos id": (lambda d: replace_value(d, b"eos_token_id", u32(39), u32(40)), "eos_token_id 40"),
    "eos type": (lambda d: replace_value(d, b"eos_token_id", u32(4), u32(6)), "eos_token_id"),
    "architecture": (lambda d: d.replace(b"\0llama", b"\0\xff\xfe\xff\xffa", 1), "general.architecture"),
    "template": (lambda d: d.replace(b"{{ messages", b"\xff{ messages"), "chat_template"),
    "dimensions": (lambda d: replace_value(d, b"token_embd.weight", u32(2), u32(1 << 31)), "token_embd"),
    "empty": (lambda d: replace_value(d, b"token_embd.weight", u64(HIDDEN), u64(0)), "token_embd"),
    "too large": (lambda d: replace_value(d, b"token_embd.weight", u64(40), HUGE), "token_embd.weight ends"),
}


def load(path) -> Checkpoint:
    checkpoint = open_checkpoint(path)
    for name in checkpoint.tensor_names():
        checkpoint.tensor(name).to_dense(torch.float32)
    checkpoint.tokenizer_json()
    return checkpoint


@pytest.mark.timeout(60)
@pytest.mark.parametrize("lie", LIES)
def test_headers_that_lie(tmp_path, lie):
    """Each is refused at once, by name; none makes the reader loop over what is not there."""
    path = write(tmp_path / "m.gguf")
    load(path)
    change, message = LIES[lie]
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(CheckpointError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_cut_tensor_data_names_the_tensor(tmp_path):
    path = write(tmp_path / "m.gguf")
    path.write_bytes(path.read_bytes()[:-64])
    with pytest.raises(CheckpointError, match=r"blk\.0\.attn_k\.weight ends behind"):
        open_checkpoint(path)


def test_types_and_versions_not_read(tmp_path):
    path = write(tmp_path / "m.gguf")
    whole = path.read_bytes()
    path.write_bytes(whole[:4] + struct.pack(">I", 3) + whole[8:])
    with pytest.raises(UnsupportedCheckpointError, match="version"):
        open_checkpoint(path)
    path.write_bytes(replace_value(whole, b"attn_norm.weight", u32(0), u32(30000)))
    with pytest.raises(CheckpointError, match=r"attn_norm"):
        open_checkpoint(path)
    tq = gguf.GGMLQuantizationType.IQ4_NL  # 32 weights in 18 bytes
    raw = np.zeros((4, 18), dtype=np.uint8)
    path = write(tmp_path / "iq.gguf", extra=lambda w: w.add_tensor("output.weight", raw, raw_dtype=tq))
    with pytest.raises(UnsupportedCheckpointError, match=r"lm_head\.weight has type IQ4_NL"):
        open_checkpoint(path).tensor("lm_head.weight")


@pytest.mark.parametrize("field", ["model", "pre"])
def test_tokenizers_not_read(tmp_path, field):
    old, new = {"model": (b"gpt2", b"bert"), "pre": (b"gpt-2", b"other")}[field]
    path = write(tmp_path / "m.gguf")
    path.write_bytes(replace_value(path.read_bytes(), b"tokenizer.ggml." + field.encode(), old, new))
    with pytest.raises(UnsupportedCheckpointError, match=f"tokenizer.ggml.{field}"):
        open_checkpoint(path).tokenizer_json()
