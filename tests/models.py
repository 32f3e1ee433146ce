"""Tiny random checkpoints in the published layout, written by transformers."""

from pathlib import Path
from typing import Any

import torch

VOCAB = 320
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 128,
    },
}


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE without merges, and three control tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)


def write_checkpoint(
    folder: Path,
    family: str = "llama",
    rope: str = "default",
    heads: tuple[int, int] = (4, 2),
    tied: bool = False,
    bias: bool = False,
    shard: str = "5GB",
    seed: int = 0,
    intermediate: int = 96,
) -> Any:
    """Write a random model and return it, in float32 and eval mode."""
    import transformers

    torch.manual_seed(seed)
    shared = {
        "vocab_size": VOCAB,
        "hidden_size": 16 * heads[0],
        "intermediate_size": intermediate,
        "num_hidden_layers": 3,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "max_position_embeddings": 4096,
        "rope_parameters": ROPES[rope],
        "tie_word_embeddings": tied,
        "initializer_range": 0.15,  # large enough for decided logits
        "bos_token_id": None,
        "eos_token_id": 257,
        "pad_token_id": 258,
    }
    if family == "llama":
        config = transformers.LlamaConfig(**shared, attention_bias=bias, mlp_bias=bias)
        model = transformers.LlamaForCausalLM(config)
    else:
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**shared))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    model.eval()
    model.save_pretrained(folder, max_shard_size=shard)
    write_tokenizer(folder)
    return model


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """`count` greedy tokens of transformers, end tokens ignored."""
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        out = model(ids, use_cache=True)
        tokens = [int(out.logits[0, -1].argmax())]
        for _ in range(count - 1):
            step = torch.tensor([[tokens[-1]]])
            out = model(step, past_key_values=out.past_key_values, use_cache=True)
            tokens.append(int(out.logits[0, -1].argmax()))
    return tokens
