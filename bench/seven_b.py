"""A randomly initialised model of Qwen2.5-7B's shape in Q4_0, written block by block to the user's cache."""

from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

from bench.engines.llama_cpp import CACHE

Q4_0_BLOCK, Q4_0_BYTES = 32, 18


@dataclass(frozen=True)
class Shape:
    """Sizes of a Qwen2 model; the defaults are the 7B's, but for the vocabulary."""

    layers: int = 28
    hidden: int = 3584
    intermediate: int = 18944
    heads: int = 28
    kv_heads: int = 4
    head_dim: int = 128


def seven_b(tokenizer_from: Path, shape: Shape = Shape(), out: Path | None = None) -> Path:
    """The file, written at the first call; tokenizer and vocabulary are those of `tokenizer_from`."""
    out = out or CACHE / "qwen2.5-7b-shape-q4_0.gguf"
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        part = out.with_suffix(".part")
        _write(part, gguf.GGUFReader(tokenizer_from), shape)
        part.rename(out)
    return out


def _write(path: Path, source: gguf.GGUFReader, shape: Shape) -> None:
    """Tensor table first, then one tensor after the other: no more than one is in memory."""
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_name("Qwen2.5-7B's shape, random weights")
    writer.add_block_count(shape.layers)
    writer.add_context_length(32768)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    for name, field in source.fields.items():
        if name.startswith("tokenizer."):
            sub_type = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type)
    vocab = next(int(t.shape[1]) for t in source.tensors if t.name == "token_embd.weight")
    tensors = _tensors(shape, vocab)
    for name, size in tensors.items():
        if len(size) == 1:
            writer.add_tensor_info(name, size, np.dtype(np.float32), 4 * size[0])
        else:
            stored = (size[0], size[1] // Q4_0_BLOCK * Q4_0_BYTES)
            kind = gguf.GGMLQuantizationType.Q4_0
            writer.add_tensor_info(name, stored, np.dtype(np.uint8), stored[0] * stored[1], kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.default_rng(0)
    for name, size in tensors.items():
        writer.write_tensor_data(_dense(name, size[0]) if len(size) == 1 else _blocks(rng, *size))
    writer.close()


def _tensors(shape: Shape, vocab: int) -> dict[str, tuple[int, ...]]:
    """GGUF's names; matrices are [rows, columns]."""
    hidden, kv, query = shape.hidden, shape.kv_heads * shape.head_dim, shape.heads * shape.head_dim
    found: dict[str, tuple[int, ...]] = {"token_embd.weight": (vocab, hidden)}
    for i in range(shape.layers):
        layer: dict[str, tuple[int, ...]] = {
            "attn_norm.weight": (hidden,),
            "attn_q.weight": (query, hidden),
            "attn_q.bias": (query,),
            "attn_k.weight": (kv, hidden),
            "attn_k.bias": (kv,),
            "attn_v.weight": (kv, hidden),
            "attn_v.bias": (kv,),
            "attn_output.weight": (hidden, query),
            "ffn_norm.weight": (hidden,),
            "ffn_gate.weight": (shape.intermediate, hidden),
            "ffn_up.weight": (shape.intermediate, hidden),
            "ffn_down.weight": (hidden, shape.intermediate),
        }
        found |= {f"blk.{i}.{name}": size for name, size in layer.items()}
    return found | {"output_norm.weight": (hidden,), "output.weight": (vocab, hidden)}


def _dense(name: str, size: int) -> np.ndarray:
    return np.full(size, 1.0 if "norm" in name else 0.0, dtype=np.float32)


def _blocks(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Random codes; scales that give the weights a standard deviation of about `columns ** -0.5`."""
    count = rows * columns // Q4_0_BLOCK
    blocks = np.frombuffer(rng.bytes(count * Q4_0_BYTES), dtype=np.uint8).reshape(count, Q4_0_BYTES).copy()
    scales = (rng.random(count, dtype=np.float32) + 0.5) * (columns**-0.5 / 4.6)
    blocks[:, :2] = scales.astype(np.float16)[:, None].view(np.uint8)
    return blocks.reshape(rows, -1)
