"""Reads the `vision_config` of a Qwen2.5-VL config.json; refuses what it would have to guess."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from flexjudge_fast.errors import UnsupportedCheckpointError
from flexjudge_fast.models.config_fields import refuse_unknown

_SIZES = {  # field of config.json: field of `VisionConfig`
    "depth": "num_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_heads": "num_heads",
    "out_hidden_size": "out_hidden_size",
    "patch_size": "patch_size",
    "spatial_merge_size": "merge_size",
    "temporal_patch_size": "temporal_patch_size",
    "window_size": "window_size",
}
_TOKENS: dict[
    str, tuple[tuple[str, ...], int | None]
] = {  # names in config.json, and Qwen's id where there is none
    "image_token_id": (("image_token_id", "image_token_index"), None),
    "video_token_id": (("video_token_id", "video_token_index"), None),
    "vision_start_token_id": (("vision_start_token_id",), 151652),
    "vision_end_token_id": (("vision_end_token_id",), 151653),
}
_FIXED = {
    "hidden_act": "silu",
    "in_channels": 3,
    "in_chans": 3,
    "rope_parameters": {"rope_type": "axial", "rope_theta": 10000.0},
}
_SAME = {"spatial_patch_size": "patch_size", "embed_dim": "hidden_size"}  # other names of sizes


@dataclass(frozen=True)
class VisionConfig:
    """A vision tower: sizes in elements, `patch_size` and `window_size` in pixels; and its control tokens."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    patch_size: int
    merge_size: int
    temporal_patch_size: int
    window_size: int
    full_attention_layers: frozenset[int]
    tokens_per_second: float  # positions in time of a second of video
    seconds_per_chunk: float  # of video and sound in turns, where a video is heard
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def merged_patches(self) -> int:
        """Patches that become one embedding."""
        return self.merge_size**2

    @property
    def patch_elements(self) -> int:
        """Values of one patch: channels, frames, height, width."""
        return 3 * self.temporal_patch_size * self.patch_size**2


def read_vision_config(config: Mapping[str, Any], ignore: Collection[str] = ()) -> VisionConfig | None:
    """The vision tower that config.json describes; `None` for a text model.

    Args:
        config: the parsed `config.json`.
        ignore: names of unknown fields to accept unseen.

    Raises:
        UnsupportedCheckpointError: a field is missing, unknown, or asks for other maths.
    """
    vision = config.get("vision_config")
    if vision is None:
        return None
    if not isinstance(vision, Mapping):
        raise UnsupportedCheckpointError("config field vision_config: an object is expected")
    known = {*_SIZES, "fullatt_block_indexes", "tokens_per_second"}
    same = {name: vision.get(other) for name, other in _SAME.items()}
    refuse_unknown(vision, known, ignore, "vision_config.", {**_FIXED, **same})
    sizes = {name: _positive(vision, field) for field, name in _SIZES.items()}
    head_dim, rest = divmod(sizes["hidden_size"], sizes["num_heads"])
    if rest or head_dim % 4:
        raise UnsupportedCheckpointError(
            f"config field vision_config.num_heads: {sizes['hidden_size']} / {sizes['num_heads']} is no "
            "multiple of 4, as two-dimensional RoPE needs"
        )
    if sizes["window_size"] // sizes["merge_size"] // sizes["patch_size"] < 1:
        raise UnsupportedCheckpointError(
            "config field vision_config.window_size: it is below one merged patch"
        )
    layers = vision.get("fullatt_block_indexes")
    if not isinstance(layers, list | tuple) or any(type(i) is not int for i in layers):
        raise UnsupportedCheckpointError("config field vision_config.fullatt_block_indexes is missing")
    # Qwen2.5-Omni says it for all that has time.
    speed = config.get("position_id_per_seconds", vision.get("tokens_per_second"))
    turn = config.get("seconds_per_chunk", 2.0)
    if isinstance(turn, bool) or not isinstance(turn, int | float) or turn <= 0:
        raise UnsupportedCheckpointError(f"config field seconds_per_chunk: {turn!r} is no duration")
    if isinstance(speed, bool) or not isinstance(speed, int | float) or speed < 0:
        raise UnsupportedCheckpointError(
            f"config field vision_config.tokens_per_second: {speed!r} is no speed"
        )
    tokens = {name: _token(config, *found) for name, found in _TOKENS.items()}
    return VisionConfig(
        **sizes,
        **tokens,
        full_attention_layers=frozenset(layers),
        tokens_per_second=float(speed),
        seconds_per_chunk=float(turn),
    )


def _positive(vision: Mapping[str, Any], name: str) -> int:
    value = vision.get(name)
    if type(value) is not int or value <= 0:
        raise UnsupportedCheckpointError(
            f"config field vision_config.{name}: {value!r} is not a positive integer"
        )
    return value


def _token(config: Mapping[str, Any], names: tuple[str, ...], default: int | None) -> int:
    value = next((config[name] for name in names if config.get(name) is not None), default)
    if type(value) is not int or value < 0:
        raise UnsupportedCheckpointError(f"config field {names[0]}: {value!r} is not a token id")
    return value
