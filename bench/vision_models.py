"""Random Qwen2.5-VL checkpoints of a given shape, in transformers' layout, and pictures to show them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from bench.engines import MissingError
from flexjudge_fast.weights.checkpoint import Checkpoint
from flexjudge_fast.weights.tensor import DenseTensor, Weight

CONTROL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|vision_start|>", "<|vision_end|>"]
CONTROL += ["<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]  # ids from 256 on
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class VisionShape:
    """Of the vision tower and of the language model behind it."""

    eye_layers: int
    eye_hidden: int
    eye_inner: int
    eye_heads: int
    full: tuple[int, ...]
    layers: int
    hidden: int
    inner: int
    heads: int


# The published tower, behind it as little as possible of the published width.
REAL_TOWER = VisionShape(32, 1280, 3420, 16, (7, 15, 23, 31), 1, 3584, 64, 28)
# What a round of judgements takes a minute with.
SMALL = VisionShape(8, 640, 1712, 8, (3, 7), 8, 512, 1408, 8)


def write_model(folder: Path, shape: VisionShape, dtype: torch.dtype) -> Any:
    """Write the checkpoint and return transformers' model, in eval mode."""
    try:
        import transformers
    except ImportError as error:
        raise MissingError("transformers is not installed (pip install transformers)") from error
    torch.manual_seed(0)
    half = shape.hidden // shape.heads // 2
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 320,
            "hidden_size": shape.hidden,
            "intermediate_size": shape.inner,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.heads // 4,
            "max_position_embeddings": 8192,
            "rope_scaling": {"type": "mrope", "mrope_section": [half // 4, half * 3 // 8, half * 3 // 8]},
            "bos_token_id": None,
            "eos_token_id": 257,
        },
        vision_config={
            "depth": shape.eye_layers,
            "hidden_size": shape.eye_hidden,
            "intermediate_size": shape.eye_inner,
            "num_heads": shape.eye_heads,
            "out_hidden_size": shape.hidden,
            "fullatt_block_indexes": list(shape.full),
            "tokens_per_second": 2,
        },
        image_token_id=262,
        video_token_id=263,
        vision_start_token_id=259,
        vision_end_token_id=260,
    )
    model = transformers.Qwen2_5_VLForConditionalGeneration(config).to(dtype).eval()
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return model


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of bytes and control tokens, a chat template, and a preprocessor."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(CONTROL)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    (folder / "preprocessor_config.json").write_text(json.dumps({"min_pixels": 3136, "max_pixels": 12845056}))


class InMemory(Checkpoint):
    """Tensors that are there already, as a checkpoint."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.path = Path("memory")
        self._tensors = tensors

    def tensor_names(self) -> Sequence[str]:
        return tuple(self._tensors)

    def tensor(self, name: str) -> Weight:
        return DenseTensor(self._tensors[name])

    def tokenizer_json(self) -> str:
        return "{}"

    def weight_files(self) -> Sequence[Path]:
        return ()


def picture(seed: int, width: int = 448, height: int = 448) -> Image.Image:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height))
