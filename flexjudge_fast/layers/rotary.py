"""Rotary frequencies and cos/sin tables for every RoPE variant that is supported."""

import math
from dataclasses import dataclass

import torch

from flexjudge_fast.errors import UnsupportedCheckpointError
from flexjudge_fast.ops.rotary_kv import RotaryAngles


@dataclass(frozen=True)
class RopeConfig:
    """RoPE as `config.json` asks for it; lengths in tokens."""

    head_dim: int
    theta: float
    max_positions: int
    rope_type: str = "default"  # default | linear | llama3 | yarn | factors
    factor: float = 1.0
    original_max_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    factors: tuple[float, ...] = ()  # [head_dim / 2], divide the frequencies one by one
    sections: tuple[int, ...] = ()  # of head_dim / 2: pairs that turn by time, height and width (M-RoPE)


class Rotary:
    """cos and sin of every position, looked up by position."""

    def __init__(self, config: RopeConfig, max_len: int, device: torch.device) -> None:
        inv_freq, attention_factor = rope_frequencies(config)
        positions = torch.arange(max_len, dtype=torch.float32)
        angles = torch.outer(positions, inv_freq)  # [max_len, head_dim / 2]
        self.sections = config.sections
        self.cos = (angles.cos() * attention_factor).to(device)
        self.sin = (angles.sin() * attention_factor).to(device)

    def __call__(self, positions: torch.Tensor, dtype: torch.dtype) -> RotaryAngles:
        """How far the tokens of a step turn, in a model of `dtype`.

        positions: [num_tokens] int64; with sections [3, num_tokens] (M-RoPE, Wang et al. 2024, section 2.1).
        """
        return RotaryAngles(self.cos, self.sin, positions, self.sections, dtype)


def rope_frequencies(config: RopeConfig) -> tuple[torch.Tensor, float]:
    """Inverse frequencies [head_dim / 2] float32, and the factor on cos and sin."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    inv_freq = 1.0 / (config.theta**exponent)
    if config.rope_type == "default":
        return inv_freq, 1.0
    if config.rope_type == "linear":
        return inv_freq / config.factor, 1.0
    if config.rope_type == "llama3":
        return _llama3(inv_freq, config), 1.0
    if config.rope_type == "yarn":
        return _yarn(inv_freq, config)
    if config.rope_type == "factors":
        return inv_freq / torch.tensor(config.factors, dtype=torch.float32), 1.0
    raise UnsupportedCheckpointError(f"config field rope_type: {config.rope_type!r} is not supported")


def _llama3(inv_freq: torch.Tensor, config: RopeConfig) -> torch.Tensor:
    """Llama 3.1: long wavelengths are stretched, short ones kept, the band between blended."""
    wavelength = 2 * math.pi / inv_freq
    old = config.original_max_positions
    low, high = config.low_freq_factor, config.high_freq_factor
    smooth = (old / wavelength - low) / (high - low)
    blended = (1 - smooth) * inv_freq / config.factor + smooth * inv_freq
    out = torch.where(wavelength > old / low, inv_freq / config.factor, blended)
    return torch.where(wavelength < old / high, inv_freq, out)


def _yarn(inv_freq: torch.Tensor, config: RopeConfig) -> tuple[torch.Tensor, float]:
    """YaRN (Peng et al. 2023, section 3.2): interpolate by a ramp over rotations per context."""
    dim, old = config.head_dim, config.original_max_positions

    def correction(rotations: float) -> float:
        return dim * math.log(old / (rotations * 2 * math.pi)) / (2 * math.log(config.theta))

    low, high = correction(config.beta_fast), correction(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # the ramp must not be a step of width zero
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    scaled = inv_freq / config.factor * ramp + inv_freq * (1 - ramp)
    return scaled, _yarn_attention_factor(config)


def _yarn_attention_factor(config: RopeConfig) -> float:
    def mscale(factor: float, weight: float = 1.0) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if config.attention_factor is not None:
        return config.attention_factor
    if config.mscale and config.mscale_all_dim:
        return mscale(config.factor, config.mscale) / mscale(config.factor, config.mscale_all_dim)
    return mscale(config.factor)
