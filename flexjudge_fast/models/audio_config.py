"""Reads the `audio_config` of a Qwen2.5-Omni Thinker; refuses what it would have to guess."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from flexjudge_fast.errors import UnsupportedCheckpointError
from flexjudge_fast.models.config_fields import refuse_unknown

_SIZES = {  # field of config.json: field of `AudioConfig`
    "num_mel_bins": "num_mel_bins",
    "encoder_layers": "num_layers",
    "encoder_attention_heads": "num_heads",
    "encoder_ffn_dim": "intermediate_size",
    "d_model": "hidden_size",
    "max_source_positions": "max_positions",
    "n_window": "half_window",
    "output_dim": "output_size",
}
_FIXED = {"activation_function": "gelu", "scale_embedding": False}
_HARMLESS = frozenset(["dropout", "activation_dropout", "encoder_layerdrop", "num_hidden_layers"])


@dataclass(frozen=True)
class AudioConfig:
    """An audio tower. `half_window`: a window is twice as many frames of the spectrogram."""

    num_mel_bins: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    hidden_size: int
    max_positions: int
    half_window: int
    output_size: int
    audio_token_id: int
    audio_start_token_id: int
    audio_end_token_id: int

    @property
    def window(self) -> int:
        """Frames of the spectrogram that are embedded and attend to each other."""
        return 2 * self.half_window


def read_audio_config(config: Mapping[str, Any], ignore: Collection[str] = ()) -> AudioConfig | None:
    """The audio tower that a Thinker's config describes; `None` for a model that does not hear.

    Raises:
        UnsupportedCheckpointError: a field is missing, unknown, or asks for other maths.
    """
    audio = config.get("audio_config")
    if audio is None:
        return None
    if not isinstance(audio, Mapping):
        raise UnsupportedCheckpointError("config field audio_config: an object is expected")
    refuse_unknown(audio, {*_SIZES, *_HARMLESS}, ignore, "audio_config.", _FIXED)
    sizes = {name: _positive(audio, field) for field, name in _SIZES.items()}
    if sizes["hidden_size"] % (2 * sizes["num_heads"]):
        raise UnsupportedCheckpointError(
            f"config field audio_config.encoder_attention_heads: {sizes['num_heads']} heads do not divide "
            f"d_model={sizes['hidden_size']}"
        )
    if sizes["half_window"] > sizes["max_positions"]:
        raise UnsupportedCheckpointError(
            "config field audio_config.n_window: it is above max_source_positions"
        )
    tokens = {
        "audio_token_id": _token(config, "audio_token_id", "audio_token_index"),
        "audio_start_token_id": _token(config, "audio_start_token_id"),
        "audio_end_token_id": _token(config, "audio_end_token_id"),
    }
    return AudioConfig(**sizes, **tokens)


def _positive(audio: Mapping[str, Any], name: str) -> int:
    value = audio.get(name)
    if type(value) is not int or value <= 0:
        raise UnsupportedCheckpointError(
            f"config field audio_config.{name}: {value!r} is not a positive integer"
        )
    return value


def _token(config: Mapping[str, Any], *names: str) -> int:
    value = next((config[name] for name in names if config.get(name) is not None), None)
    if type(value) is not int or value < 0:
        raise UnsupportedCheckpointError(f"config field {names[0]}: {value!r} is not a token id")
    return value
