"""Reads the `config.json` of a decoder into a typed `DecoderConfig`; refuses what it would have to guess."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from flexjudge_fast.errors import UnsupportedCheckpointError
from flexjudge_fast.layers.rotary import RopeConfig
from flexjudge_fast.models.config_fields import refuse_unknown
from flexjudge_fast.models.mol_llama_config import MOL_LLAMA, is_mol_llama
from flexjudge_fast.weights.quantization import OWN_CONFIG

_MATHS = frozenset(
    [
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "vocab_size",
        "rms_norm_eps",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "max_position_embeddings",
        "tie_word_embeddings",
        "hidden_act",
        "attention_bias",
        "mlp_bias",
        "use_sliding_window",
        "layer_types",
    ]
)
# Fields of published checkpoints that do not change the logits of a dense decoder.
_HARMLESS = frozenset(
    [
        "ignore_index",
        "is_llama_config",
        "max_window_layers",
        "name_or_path",
        "pretraining_tp",
        "sliding_window",
        "transformers.js_config",
        "unk_token_id",
    ]
)
# What surrounds the decoder's own fields in a vision-language checkpoint.
_VISION_LANGUAGE = "Qwen2_5_VLForConditionalGeneration"
_THINKER = "Qwen2_5OmniThinkerForConditionalGeneration"
_LLAMAS = ("LlamaForCausalLM", MOL_LLAMA)
_WHOLE_OMNI = ("Qwen2_5OmniForConditionalGeneration", "Qwen2_5OmniModel")  # Thinker, talker and vocoder
_MULTIMODAL = frozenset(
    [
        "text_config",
        "vision_config",
        "image_token_id",
        "video_token_id",
        "vision_start_token_id",
        "vision_end_token_id",
        "vision_token_id",
        "audio_config",
        "audio_token_id",
        "audio_token_index",
        "image_token_index",
        "video_token_index",
        "audio_start_token_id",
        "audio_end_token_id",
        "user_token_id",
        "position_id_per_seconds",
        "seconds_per_chunk",
    ]
)
_ROPE_TYPES = ("default", "linear", "llama3", "yarn", "factors")
_ROPE_NUMBERS = (  # fields of `RopeConfig` of the same name
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
)
_ROPE_FIELDS = frozenset(
    [
        "rope_type",
        "type",
        "rope_theta",
        "original_max_position_embeddings",
        "truncate",
        "factors",
        "finetuned",
        "mrope_section",
        *_ROPE_NUMBERS,
    ]
)


@dataclass(frozen=True)
class DecoderConfig:
    """A Llama-like decoder: sizes in elements, lengths in tokens."""

    architecture: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    max_positions: int
    tie_word_embeddings: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    rope: RopeConfig


def model_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a config.json that is run: of a whole Qwen2.5-Omni its Thinker, else all of it.

    Of a Mol-LLaMA its Llama, which `MolLlamaCheckpoint` has put there.
    """
    names = config.get("architectures") or []
    if is_mol_llama(config):
        if not isinstance(config.get("text_config"), Mapping):
            raise UnsupportedCheckpointError(
                "config field text_config: a Mol-LLaMA is opened by registry.open_model"
            )
        return dict(config["text_config"])
    if len(names) != 1 or names[0] not in _WHOLE_OMNI:
        return dict(config)
    thinker = config.get("thinker_config")
    if not isinstance(thinker, Mapping):
        raise UnsupportedCheckpointError("config field thinker_config: an object is expected")
    return {**thinker, "architectures": [_THINKER]}


def read_decoder_config(config: Mapping[str, Any], ignore: Collection[str] = ()) -> DecoderConfig:
    """Translate an HF config.

    Args:
        config: the parsed `config.json`, after `model_config`.
        ignore: names of unknown fields to accept unseen.

    Raises:
        UnsupportedCheckpointError: a field is missing, unknown, or asks for other maths.
    """
    architecture = _architecture(config)
    is_qwen2 = architecture not in _LLAMAS
    has_sections = architecture in (_VISION_LANGUAGE, _THINKER)
    if has_sections:
        config = _text_part(config, ignore)
    _refuse_unknown(config, ignore)
    num_heads = _positive(config, "num_attention_heads")
    num_kv_heads = _positive(config, "num_key_value_heads", num_heads)
    hidden = _positive(config, "hidden_size")
    head_dim = _positive(config, "head_dim", hidden // num_heads)
    if num_heads % num_kv_heads:
        raise UnsupportedCheckpointError(
            f"config: num_attention_heads={num_heads} is no multiple of num_key_value_heads={num_kv_heads}"
        )
    if head_dim % 2:
        raise UnsupportedCheckpointError(f"config field head_dim: {head_dim} is odd, RoPE needs pairs")
    _require(config, "hidden_act", "silu")
    if is_qwen2:
        _require(config, "use_sliding_window", False)
    if any(kind != "full_attention" for kind in config.get("layer_types") or ()):
        raise UnsupportedCheckpointError("config field layer_types: only full_attention is supported")
    attention_bias = bool(config.get("attention_bias", False))
    max_positions = _positive(config, "max_position_embeddings")
    return DecoderConfig(
        architecture=architecture,
        hidden_size=hidden,
        intermediate_size=_positive(config, "intermediate_size"),
        num_layers=_positive(config, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=_positive(config, "vocab_size"),
        rms_norm_eps=float(_field(config, "rms_norm_eps")),
        max_positions=max_positions,
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=is_qwen2 or attention_bias,
        out_bias=not is_qwen2 and attention_bias,
        mlp_bias=not is_qwen2 and bool(config.get("mlp_bias", False)),
        rope=_read_rope(config, head_dim, max_positions, has_sections),
    )


def _text_part(config: Mapping[str, Any], ignore: Collection[str]) -> dict[str, Any]:
    """The decoder's fields of a vision-language config: at its top, or (newer) in `text_config`."""
    outer = {name: value for name, value in config.items() if name not in _MULTIMODAL}
    inner = config.get("text_config")
    if inner is None:
        return outer
    if not isinstance(inner, Mapping):
        raise UnsupportedCheckpointError("config field text_config: an object is expected")
    _refuse_unknown(outer, ignore)
    own = {name: value for name, value in inner.items() if name not in _MULTIMODAL}
    tied = outer.get("tie_word_embeddings", False)  # what the text's own part says is not what is done
    return {**own, "architectures": outer["architectures"], "tie_word_embeddings": tied}


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures") or []
    known = (*_LLAMAS, "Qwen2ForCausalLM", _VISION_LANGUAGE, _THINKER)
    if len(names) != 1 or names[0] not in known:
        raise UnsupportedCheckpointError(
            f"config field architectures: {names!r} is not supported (this version runs {', '.join(known)})"
        )
    return str(names[0])


def _refuse_unknown(config: Mapping[str, Any], ignore: Collection[str]) -> None:
    found = config.get("quantization_config")
    is_read = found is None or found is False or found == OWN_CONFIG or "quantization_config" in ignore
    if not is_read:
        if isinstance(found, Mapping) and found.get("quant_method") != OWN_CONFIG["quant_method"]:
            found = found.get("quant_method")  # else it is ours, but of another version
        raise UnsupportedCheckpointError(f"config field quantization_config: {found!r} is not supported")
    refuse_unknown(config, {*_MATHS, *_HARMLESS, "quantization_config"}, ignore)


def _read_rope(
    config: Mapping[str, Any], head_dim: int, max_positions: int, has_sections: bool
) -> RopeConfig:
    rope = dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {})
    for name in rope:
        if (name not in _ROPE_FIELDS or (name == "mrope_section" and not has_sections)) and rope[
            name
        ] is not None:
            raise UnsupportedCheckpointError(f"config field rope_parameters.{name} is unknown")
    rope_type = str(rope.get("rope_type") or rope.get("type") or "default")
    rope_type = "default" if rope_type == "mrope" and has_sections else rope_type
    if rope_type not in _ROPE_TYPES:
        raise UnsupportedCheckpointError(
            f"config field rope_parameters.rope_type: {rope_type!r} is not one of {', '.join(_ROPE_TYPES)}"
        )
    needed: dict[str, tuple[str, ...]] = {"linear": ("factor",), "yarn": ("factor",), "factors": ("factors",)}
    needed["llama3"] = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    for name in needed.get(rope_type, ()):
        if rope.get(name) is None:
            raise UnsupportedCheckpointError(
                f"config field rope_parameters.{name} is missing for {rope_type}"
            )
    numbers = {name: float(rope[name]) for name in _ROPE_NUMBERS if rope.get(name) is not None}
    return RopeConfig(
        head_dim=head_dim,
        theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
        max_positions=max_positions,
        rope_type=rope_type,
        original_max_positions=int(rope.get("original_max_position_embeddings") or max_positions),
        truncate=bool(rope.get("truncate", True)),
        factors=tuple(float(f) for f in rope.get("factors") or ()),
        sections=_read_sections(rope.get("mrope_section"), head_dim) if has_sections else (),
        **numbers,
    )


def _read_sections(value: Any, head_dim: int) -> tuple[int, ...]:
    """M-RoPE's pairs of dimensions that turn by time, by height and by width."""
    good = (
        isinstance(value, list | tuple) and len(value) == 3 and all(type(n) is int and n >= 0 for n in value)
    )
    if not good or 2 * sum(value) != head_dim:
        raise UnsupportedCheckpointError(
            f"config field rope_parameters.mrope_section: {value!r}, three sizes are expected that add up to "
            f"{head_dim // 2}"
        )
    return tuple(value)


def _field(config: Mapping[str, Any], name: str) -> Any:
    if config.get(name) is None:
        raise UnsupportedCheckpointError(f"config field {name} is missing")
    return config[name]


def _positive(config: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = config.get(name)
    if value is None:
        value = default if default is not None else _field(config, name)
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise UnsupportedCheckpointError(f"config field {name}: {value!r} is not a positive integer")
    return value


def _require(config: Mapping[str, Any], name: str, wanted: Any) -> None:
    if config.get(name, wanted) != wanted:
        raise UnsupportedCheckpointError(
            f"config field {name}: {config[name]!r}, only {wanted!r} is supported"
        )
