"""Writes a tiny Qwen2.5-VL checkpoint with random weights: something to try images and video with, no judge.

python examples/make_tiny_vl.py tiny-vl
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

# Qwen's control tokens in Qwen's order; here they follow the 256 bytes.
CONTROL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
ID = {token: 256 + i for i, token in enumerate(CONTROL_TOKENS)}
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCAB, HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 320, 64, 96, 2, 4, 2, 16
EYE_HIDDEN, EYE_INNER, EYE_LAYERS, PATCH = 48, 52, 2, 14
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "hidden_act": "silu",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "eos_token_id": ID["<|im_end|>"],
    "image_token_id": ID["<|image_pad|>"],
    "video_token_id": ID["<|video_pad|>"],
    "vision_start_token_id": ID["<|vision_start|>"],
    "vision_end_token_id": ID["<|vision_end|>"],
    "vision_config": {
        "model_type": "qwen2_5_vl",
        "depth": EYE_LAYERS,
        "hidden_size": EYE_HIDDEN,
        "intermediate_size": EYE_INNER,
        "num_heads": 2,
        "out_hidden_size": HIDDEN,
        "hidden_act": "silu",
        "in_chans": 3,
        "patch_size": PATCH,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "tokens_per_second": 2,
        "window_size": 112,
        "fullatt_block_indexes": [1],
    },
}
PREPROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": PATCH,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


def shapes() -> dict[str, tuple[int, ...]]:
    """Every tensor, under its published name."""
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCAB, HIDDEN),
        "visual.patch_embed.proj.weight": (EYE_HIDDEN, 3, 2, PATCH, PATCH),
        "visual.merger.ln_q.weight": (EYE_HIDDEN,),
    }

    def linear(name: str, rows: int, columns: int, bias: bool = True) -> None:
        found[f"{name}.weight"] = (rows, columns)
        if bias:
            found[f"{name}.bias"] = (rows,)

    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        found[layer + "input_layernorm.weight"] = found[layer + "post_attention_layernorm.weight"] = (HIDDEN,)
        linear(layer + "self_attn.q_proj", HEADS * HEAD_DIM, HIDDEN)
        linear(layer + "self_attn.k_proj", KV_HEADS * HEAD_DIM, HIDDEN)
        linear(layer + "self_attn.v_proj", KV_HEADS * HEAD_DIM, HIDDEN)
        linear(layer + "self_attn.o_proj", HIDDEN, HEADS * HEAD_DIM, bias=False)
        for name, size in (
            ("gate_proj", (INNER, HIDDEN)),
            ("up_proj", (INNER, HIDDEN)),
            ("down_proj", (HIDDEN, INNER)),
        ):
            linear(f"{layer}mlp.{name}", *size, bias=False)
    for i in range(EYE_LAYERS):
        block = f"visual.blocks.{i}."
        found[block + "norm1.weight"] = found[block + "norm2.weight"] = (EYE_HIDDEN,)
        linear(block + "attn.qkv", 3 * EYE_HIDDEN, EYE_HIDDEN)
        linear(block + "attn.proj", EYE_HIDDEN, EYE_HIDDEN)
        linear(block + "mlp.gate_proj", EYE_INNER, EYE_HIDDEN)
        linear(block + "mlp.up_proj", EYE_INNER, EYE_HIDDEN)
        linear(block + "mlp.down_proj", EYE_HIDDEN, EYE_INNER)
    linear("visual.merger.mlp.0", 4 * EYE_HIDDEN, 4 * EYE_HIDDEN)
    linear("visual.merger.mlp.2", HIDDEN, 4 * EYE_HIDDEN)
    return found


def save_weights(folder: Path, tensor_shapes: dict[str, tuple[int, ...]], seed: int) -> None:
    """Ones for the weights of norms, and random numbers; the same bytes for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in tensor_shapes.items():
        is_norm = name.endswith(("weight", "running_var")) and len(shape) == 1
        tensors[name] = torch.ones(shape) if is_norm else 0.15 * torch.randn(shape, generator=generator)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def save_tokenizer(folder: Path, control_tokens: Sequence[str]) -> None:
    """A token for each byte, then the control tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(control_tokens))
    tokenizer.save(str(folder / "tokenizer.json"))


def save_json(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content, indent=1))


def write(
    folder: Path,
    seed: int = 0,
    tensor_shapes: dict[str, tuple[int, ...]] | None = None,
    more_tokens: Sequence[str] = (),
) -> None:
    """The whole checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(folder, tensor_shapes or shapes(), seed)
    save_tokenizer(folder, [*CONTROL_TOKENS, *more_tokens])
    files = {
        "config.json": CONFIG,
        "preprocessor_config.json": PREPROCESSOR,
        "tokenizer_config.json": {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        "chat_template.json": {"chat_template": CHAT_TEMPLATE},
    }
    save_json(folder, files)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    write(Path(sys.argv[1]))
    print(f"{sys.argv[1]}: random weights, no judge")
