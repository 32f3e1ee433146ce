"""Tiny random checkpoints in the published layout, written by transformers."""

import json
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


# As Qwen2.5-VL-7B-Instruct publishes it.
PREPROCESSOR: dict[str, Any] = {
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2_5_VLProcessor",
}
AUDIO_PREPROCESSOR: dict[str, Any] = {
    "feature_extractor_type": "WhisperFeatureExtractor",
    "feature_size": 128,
    "sampling_rate": 16000,
    "hop_length": 160,
    "chunk_length": 300,
    "n_fft": 400,
    "n_samples": 4800000,
    "nb_max_frames": 30000,
    "padding_side": "right",
    "padding_value": 0.0,
    "return_attention_mask": True,
    "dither": 0.0,
}
# Talker and vocoder: names as published, values and types that are refused where they are read.
UNREADABLE = {
    "talker.codec_head.weight": torch.full((16, 8), torch.inf),
    "talker.model.embed_tokens.weight": torch.full((16, 64), torch.nan),
    "talker.model.layers.0.self_attn.q_proj.weight": torch.full((8, 8), torch.nan),
    "talker.model.norm.weight": torch.full((8,), torch.nan),
    "talker.thinker_to_talker_proj.weight": torch.zeros(8, 64, dtype=torch.float8_e4m3fn),
    "token2wav.code2wav_bigvgan_model.conv_pre.weight": torch.full((8, 8, 7), torch.nan),
    "token2wav.code2wav_dit_model.text_embed.codec_embed.weight": torch.full((16, 8), -1, dtype=torch.int8),
    "token2wav.code2wav_dit_model.rotary_embed.inv_freq": torch.zeros(4, dtype=torch.int64),
}
VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")


def write_tokenizer(folder: Path, more: tuple[str, ...] = ()) -> None:
    """A byte-level BPE without merges, three control tokens (ids 256 to 258) and `more`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|endoftext|>", *more])
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


def write_vision_checkpoint(
    folder: Path,
    tied: bool = False,
    shard: str = "5GB",
    seed: int = 0,
    new_names: bool = False,
    **vision: Any,
) -> Any:
    """Write a random Qwen2.5-VL and return it, in float32 and eval mode.

    `new_names`: tensor names with the newer prefixes; transformers 5 writes the older ones.
    """
    import transformers

    torch.manual_seed(seed)
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            "vocab_size": VOCAB,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
            "tie_word_embeddings": tied,
            "initializer_range": 0.15,
            "bos_token_id": None,
            "eos_token_id": 257,
        },
        vision_config={
            "depth": 4,
            "hidden_size": 48,
            "intermediate_size": 52,
            "num_heads": 2,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [1, 3],
            "tokens_per_second": 2,
            "initializer_range": 0.15,
            **vision,
        },
        image_token_id=262,
        video_token_id=263,
        vision_start_token_id=259,
        vision_end_token_id=260,
        tie_word_embeddings=tied,
    )
    model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    model.eval()
    model.save_pretrained(folder, max_shard_size=shard)
    write_tokenizer(folder, VISION_TOKENS)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    if new_names:
        _rename_tensors(folder)
    return model


def write_omni_checkpoint(folder: Path, whole: bool = False, seed: int = 0) -> Any:
    """Write a random Thinker of Qwen2.5-Omni and return it, in float32 and eval mode.

    `whole`: as it is published, with a talker and a vocoder that nobody must read, see `UNREADABLE`.
    """
    import transformers

    torch.manual_seed(seed)
    rope = {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [2, 3, 3]}
    config = transformers.Qwen2_5OmniThinkerConfig(
        text_config={
            "vocab_size": VOCAB,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "rope_parameters": rope,
            "initializer_range": 0.15,
        },
        vision_config={
            "depth": 3,
            "hidden_size": 48,
            "intermediate_size": 52,
            "num_heads": 2,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [1],
            "initializer_range": 0.15,
        },
        audio_config={
            "d_model": 48,
            "encoder_layers": 3,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 60,
            "output_dim": 64,
            "initializer_range": 0.15,
        },
        image_token_index=262,
        video_token_index=263,
        audio_token_index=264,
        vision_start_token_id=259,
        vision_end_token_id=260,
        audio_start_token_id=265,
        audio_end_token_id=266,
        eos_token_id=257,
    )
    model = transformers.Qwen2_5OmniThinkerForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    model.eval()
    model.save_pretrained(folder)
    write_tokenizer(folder, (*VISION_TOKENS, "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"))
    (folder / "preprocessor_config.json").write_text(json.dumps({**PREPROCESSOR, **AUDIO_PREPROCESSOR}))
    if whole:
        _make_whole(folder)
    return model


def _make_whole(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    (path,) = folder.glob("*.safetensors")
    tensors = {f"thinker.{name}": tensor for name, tensor in load_file(path).items()}
    save_file({**tensors, **UNREADABLE}, path, {"format": "pt"})
    thinker = json.loads((folder / "config.json").read_text())
    config = {
        "architectures": ["Qwen2_5OmniForConditionalGeneration"],
        "model_type": "qwen2_5_omni",
        "thinker_config": {**thinker, "architectures": ["Qwen2OmniNaViTThinkerForConditionalGeneration"]},
        "talker_config": {"hidden_size": 8},
        "token2wav_config": {},
        "enable_audio_output": True,
    }
    (folder / "config.json").write_text(json.dumps(config))


def _rename_tensors(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    (path,) = folder.glob("*.safetensors")
    prefixes = {"visual.": "model.visual.", "model.": "model.language_model.", "lm_head.": "lm_head."}
    renamed = {}
    for name, tensor in load_file(path).items():
        old = next(prefix for prefix in prefixes if name.startswith(prefix))
        renamed[prefixes[old] + name.removeprefix(old)] = tensor
    save_file(renamed, path, {"format": "pt"})


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
