"""Writes a tiny Thinker of Qwen2.5-Omni with random weights: something to try sound with, no judge.

python examples/make_tiny_omni.py tiny-omni

A recording for it, melody.wav, comes with it.
"""

import sys
from pathlib import Path
from typing import Any

import soundfile

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH leaves it out
import make_tiny_vl as vl
from judge_sounds import melody

AUDIO_TOKENS = ["<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"]
FIRST_AUDIO_ID = 256 + len(vl.CONTROL_TOKENS)
EAR_HIDDEN, EAR_INNER, EAR_LAYERS, MEL_BINS = 48, 60, 2, 128
TEXT_FIELDS = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
]
PREPROCESSOR = {
    **vl.PREPROCESSOR,
    "feature_extractor_type": "WhisperFeatureExtractor",
    "feature_size": MEL_BINS,
    "sampling_rate": 16000,
    "hop_length": 160,
    "chunk_length": 300,
    "n_fft": 400,
    "padding_side": "right",
    "padding_value": 0.0,
    "return_attention_mask": True,
    "dither": 0.0,
}


def config() -> dict[str, Any]:
    """As the published one of the Thinker."""
    return {
        "architectures": ["Qwen2_5OmniThinkerForConditionalGeneration"],
        "model_type": "qwen2_5_omni_thinker",
        "text_config": {name: vl.CONFIG[name] for name in TEXT_FIELDS},
        "vision_config": {**vl.CONFIG["vision_config"], "model_type": "qwen2_5_omni_vision_encoder"},
        "audio_config": {
            "model_type": "qwen2_5_omni_audio_encoder",
            "num_mel_bins": MEL_BINS,
            "encoder_layers": EAR_LAYERS,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": EAR_INNER,
            "d_model": EAR_HIDDEN,
            "max_source_positions": 1500,
            "n_window": 100,
            "output_dim": vl.HIDDEN,
        },
        "torch_dtype": "float32",
        "eos_token_id": vl.CONFIG["eos_token_id"],
        "image_token_index": vl.CONFIG["image_token_id"],
        "video_token_index": vl.CONFIG["video_token_id"],
        "audio_token_index": FIRST_AUDIO_ID,
        "vision_start_token_id": vl.CONFIG["vision_start_token_id"],
        "vision_end_token_id": vl.CONFIG["vision_end_token_id"],
        "audio_start_token_id": FIRST_AUDIO_ID + 1,
        "audio_end_token_id": FIRST_AUDIO_ID + 2,
        "position_id_per_seconds": 25,
        "seconds_per_chunk": 2,
    }


def shapes() -> dict[str, tuple[int, ...]]:
    """Every tensor, under its published name."""
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in vl.shapes().items():
        if ".attn.qkv." not in name:
            found[name] = shape
            continue
        for part in "qkv":  # three matrices here
            found[name.replace("qkv", part)] = (shape[0] // 3, *shape[1:])
    ear = {
        "conv1.weight": (EAR_HIDDEN, MEL_BINS, 3),
        "conv2.weight": (EAR_HIDDEN, EAR_HIDDEN, 3),
        "ln_post.weight": (EAR_HIDDEN,),
        "proj.weight": (vl.HIDDEN, EAR_HIDDEN),
    }
    for i in range(EAR_LAYERS):
        layer = f"layers.{i}."
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            ear[f"{layer}self_attn.{part}.weight"] = (EAR_HIDDEN, EAR_HIDDEN)
        ear[layer + "self_attn_layer_norm.weight"] = ear[layer + "final_layer_norm.weight"] = (EAR_HIDDEN,)
        ear[layer + "fc1.weight"] = (EAR_INNER, EAR_HIDDEN)
        ear[layer + "fc2.weight"] = (EAR_HIDDEN, EAR_INNER)
    for name, shape in ear.items():
        found["audio_tower." + name] = shape
        if not name.endswith("k_proj.weight"):
            found["audio_tower." + name.replace("weight", "bias")] = shape[:1]
    return found


def write(folder: Path, seed: int = 0) -> None:
    """The whole checkpoint; the same bytes for the same seed."""
    vl.write(folder, seed, shapes(), AUDIO_TOKENS)
    vl.save_json(folder, {"config.json": config(), "preprocessor_config.json": PREPROCESSOR})


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    write(Path(sys.argv[1]))
    soundfile.write(Path(sys.argv[1], "melody.wav"), *melody(262, 330, 392))
    print(f"{sys.argv[1]}: random weights, no judge; melody.wav: something to hear")
