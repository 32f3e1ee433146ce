"""A GGUF file, presented in the Hugging Face layout: config, names, tensors."""

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from flexjudge_fast.errors import CheckpointError, UnsupportedCheckpointError
from flexjudge_fast.weights.checkpoint import Checkpoint
from flexjudge_fast.weights.formats import find_format
from flexjudge_fast.weights.gguf_header import check_header
from flexjudge_fast.weights.gguf_tokenizer import build_tokenizer_json
from flexjudge_fast.weights.tensor import DenseTensor, QuantTensor, Weight

# What gguf, numpy and torch raise on metadata of a wrong type, length or encoding.
_BROKEN = (
    ValueError,
    LookupError,
    TypeError,
    ArithmeticError,
    OSError,
    MemoryError,
    AttributeError,
    RuntimeError,
)
_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"


class GgufCheckpoint(Checkpoint):
    """The file is mapped; quantised tensors stay as they are, and are not copied."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        check_header(path)
        try:
            self._reader = gguf.GGUFReader(path)
        except _BROKEN as error:
            raise CheckpointError(f"{path}: truncated or corrupt GGUF: {error}") from error
        self._tensors = {name: t for t in self._reader.tensors if (name := _hf_name(t.name)) is not None}
        self.config = self._read_config()
        template = self._value("tokenizer.chat_template")
        if template is not None and not isinstance(template, str):
            raise CheckpointError(f"{path}: metadata tokenizer.chat_template is not a string")
        self.tokenizer_config = {"chat_template": template, **self._token_names()}
        self.generation_config: dict[str, Any] = {}

    def tensor_names(self) -> Sequence[str]:
        return tuple(self._tensors)

    def weight_files(self) -> Sequence[Path]:
        return [self.path]

    def tensor(self, name: str) -> Weight:
        entry = self._tensors.get(name)
        if entry is None:
            raise CheckpointError(f"{self.path}: tensor {name} is missing")
        shape = tuple(int(n) for n in reversed(entry.shape))
        kind = entry.tensor_type.name
        try:
            weight = self._wrap(entry.data, kind, shape, name)
            if self.config["model_type"] == "llama" and re.search(r"\.self_attn\.[qk]_proj\.", name):
                heads = "num_attention_heads" if ".q_proj." in name else "num_key_value_heads"
                return _unpermute(weight, self.config[heads])
            return weight
        except _BROKEN as error:
            raise CheckpointError(f"{self.path}: tensor {name} ({kind}): {error}") from error

    def tokenizer_json(self) -> str:
        try:
            return build_tokenizer_json(self._value, str(self.path))
        except _BROKEN as error:
            raise CheckpointError(f"{self.path}: tokenizer metadata: {error}") from error

    def _wrap(self, data: Any, kind: str, shape: tuple[int, ...], name: str) -> Weight:
        if kind in ("F32", "F16"):
            return DenseTensor(_as_tensor(data).reshape(shape))
        if kind == "BF16":
            return DenseTensor(_as_tensor(data).reshape(-1).view(torch.bfloat16).reshape(shape))
        found = find_format(kind)
        if found is None:
            raise UnsupportedCheckpointError(
                f"{self.path}: tensor {name} has type {kind}, which is not supported"
            )
        if len(shape) != 2 or shape[1] % found.block_size:
            raise CheckpointError(f"{self.path}: tensor {name} of shape {shape} cannot be {kind}")
        row_bytes = shape[1] // found.block_size * found.block_bytes
        return QuantTensor(_as_tensor(data).reshape(shape[0], row_bytes), found, (shape[0], shape[1]))

    def _value(self, key: str) -> Any:
        """One metadata value; `None` when the key is missing."""
        field = self._reader.fields.get(key)
        try:
            return None if field is None else field.contents()
        except _BROKEN as error:
            raise CheckpointError(f"{self.path}: metadata {key}: {error}") from error

    def _read_config(self) -> dict[str, Any]:
        arch = self._value("general.architecture")
        if not isinstance(arch, str) or arch not in _ARCHITECTURES:
            raise UnsupportedCheckpointError(
                f"{self.path}: general.architecture {arch!r} is not supported "
                f"(this version reads {', '.join(_ARCHITECTURES)})"
            )

        def need(key: str) -> Any:
            value = self._value(f"{arch}.{key}")
            if value is None or isinstance(value, list):
                raise CheckpointError(f"{self.path}: metadata {arch}.{key} is missing or a list")
            return value

        try:
            config = {
                "architectures": [_ARCHITECTURES[arch]],
                "model_type": arch,
                "hidden_act": "silu",
                "num_hidden_layers": need("block_count"),
                "max_position_embeddings": need("context_length"),
                "hidden_size": need("embedding_length"),
                "intermediate_size": need("feed_forward_length"),
                "num_attention_heads": need("attention.head_count"),
                "num_key_value_heads": self._value(f"{arch}.attention.head_count_kv")
                or need("attention.head_count"),
                "rms_norm_eps": need("attention.layer_norm_rms_epsilon"),
                "head_dim": self._value(f"{arch}.attention.key_length"),
                "tie_word_embeddings": "lm_head.weight" not in self._tensors,
                "vocab_size": int(self._tensors["model.embed_tokens.weight"].shape[1]),
                "bos_token_id": self._token_id("bos"),
                "eos_token_id": self._token_id("eos"),
                "rope_parameters": self._read_rope(arch),
            }
        except _BROKEN as error:
            raise CheckpointError(f"{self.path}: metadata is incomplete: {error}") from error
        return config

    def _read_rope(self, arch: str) -> dict[str, Any]:
        prefix = f"{arch}.rope."
        rope: dict[str, Any] = {"rope_theta": self._value(prefix + "freq_base") or 10000.0}
        kind = self._value(prefix + "scaling.type")
        factors = next((t for t in self._reader.tensors if t.name == _ROPE_FACTORS), None)
        if factors is not None:
            return rope | {"rope_type": "factors", "factors": [float(f) for f in np.asarray(factors.data)]}
        if kind in (None, "none"):
            return rope | {"rope_type": "default"}
        original = self._value(prefix + "scaling.original_context_length")
        return rope | {
            "rope_type": kind,
            "factor": self._value(prefix + "scaling.factor"),
            "original_max_position_embeddings": original,
        }

    def _token_id(self, role: str) -> int | None:
        """The id of a special token, checked against the vocabulary where there is one."""
        key = f"tokenizer.ggml.{role}_token_id"
        token_id = self._value(key)
        if token_id is None:
            return None
        field = self._reader.fields.get("tokenizer.ggml.tokens")
        end = 1 << 31 if field is None else len(field.data)
        if not isinstance(token_id, int) or not 0 <= token_id < end:
            raise CheckpointError(f"{self.path}: {key} {token_id!r} is out of range")
        return token_id

    def _token_names(self) -> dict[str, Any]:
        """The special tokens' texts, by their ids in the metadata."""
        field = self._reader.fields.get("tokenizer.ggml.tokens")
        names: dict[str, Any] = {}
        for role, name in (("bos", "bos_token"), ("eos", "eos_token"), ("padding", "pad_token")):
            token_id = self._token_id(role)
            if field is None or token_id is None:
                continue
            try:
                names[name] = field.contents(token_id)
            except _BROKEN as error:
                raise CheckpointError(f"{self.path}: tokenizer.ggml.tokens[{token_id}]: {error}") from error
        return names


def _hf_name(name: str) -> str | None:
    """The Hugging Face name of a GGUF tensor; `None` for what is not a weight of the model."""
    if name in _TOP:
        return _TOP[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match and match[2] in _LAYER:
        return f"model.layers.{match[1]}.{_LAYER[match[2]]}.{match[3]}"
    return None if name == _ROPE_FACTORS else f"gguf:{name}"


def _as_tensor(data: Any) -> torch.Tensor:
    """A tensor over the mapped bytes. The map is read-only, and nothing here writes to weights."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(np.asarray(data))


def _unpermute(weight: Weight, num_heads: int) -> Weight:
    """GGUF stores llama's q and k rows with rotary pairs side by side; back to halves."""
    rows = weight.shape[0]
    if not isinstance(num_heads, int) or num_heads < 1 or rows % (2 * num_heads):
        raise ValueError(f"{rows} rows cannot be cut into {num_heads!r} heads of an even size")
    order = torch.arange(rows).reshape(num_heads, rows // num_heads // 2, 2).transpose(1, 2).reshape(-1)
    if isinstance(weight, QuantTensor):
        return QuantTensor(weight.blocks[order], weight.format, weight.shape)
    return DenseTensor(weight.data[order])
