"""Qwen2.5-Omni's audio tower in plain torch: log-mel frames to embeddings (Xu et al. 2025, section 2.2)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812

from flexjudge_fast.layers.linear import Linear
from flexjudge_fast.layers.norm import LayerNorm
from flexjudge_fast.models.audio_config import AudioConfig
from flexjudge_fast.models.loader import TensorLoader
from flexjudge_fast.ops.backend import upload
from flexjudge_fast.ops.segment_attention import Segments, segment_attention
from flexjudge_fast.weights.tensor import DenseTensor

NORM_EPS = 1e-5  # not in config.json
PREFIXES = ("audio_tower.", "thinker.audio_tower.", "model.audio_tower.")
Product = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class AudioLayer:
    """Attention, then two layers with GELU, each behind a norm, each added to the residual stream."""

    input_norm: LayerNorm
    qkv: Linear
    out: Linear
    post_norm: LayerNorm
    up: Linear
    down: Linear


class AudioTower:
    """`encode` turns spectrograms into embeddings for the language model."""

    def __init__(self, config: AudioConfig, load: TensorLoader) -> None:
        self.config = config
        self.dtype, self.device = load.dtype, load.device
        prefix = load.prefix(PREFIXES, "conv1.weight")
        hidden = config.hidden_size
        # Kernels of three frames are products with three frames side by side.
        self.conv1 = _convolution(load, prefix + "conv1", hidden, config.num_mel_bins)
        self.conv2 = _convolution(load, prefix + "conv2", hidden, hidden)
        self.positions = sinusoids(config.half_window, hidden).to(load.device)
        self.layers = [_load_layer(config, load, f"{prefix}layers.{i}.") for i in range(config.num_layers)]
        self.post_norm = load_norm(load, prefix + "ln_post", hidden)
        self.proj = load.linear([prefix + "proj"], [config.output_size], hidden, True)

    def encode(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        """Embeddings of some recordings, one after the other.

        Args:
            features: of each recording, [num_mel_bins, num_frames] float32.

        Returns:
            [num_tokens, output_size] in the model's dtype; see `media.audio_processor` for their number.
        """
        windows, starts = cut_windows(features, self.config.window)
        x = torch.cat([self._embed(upload(window, self.device, self.dtype)) for window in windows])
        segments = Segments.at(starts, self.device)
        for layer in self.layers:
            x = x + self._attend(layer, layer.input_norm(x), segments)
            x = x + layer.down(F.gelu(layer.up(layer.post_norm(x))))
        out: torch.Tensor = self.proj(self.post_norm(pool_pairs(x, features)))
        return out

    def _embed(self, window: torch.Tensor) -> torch.Tensor:
        return embed_window(window, self.conv1, self.conv2, self.positions)

    def _attend(self, layer: AudioLayer, x: torch.Tensor, segments: Segments) -> torch.Tensor:
        """x: [num_tokens, hidden]."""
        heads = layer.qkv(x).unflatten(-1, (3, self.config.num_heads, -1))
        out: torch.Tensor = layer.out(segment_attention(heads, segments).flatten(1))
        return out


def cut_windows(features: Sequence[torch.Tensor], window: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Spectrograms in windows [num_mel_bins, up to `window`], and the int64 offsets of their tokens."""
    windows = [piece for one in features for piece in one.split(window, dim=1)]
    sizes = torch.tensor([0, *((piece.shape[1] + 1) // 2 for piece in windows)])
    return windows, sizes.cumsum(0)


def embed_window(
    window: torch.Tensor, conv1: Product, conv2: Product, positions: torch.Tensor
) -> torch.Tensor:
    """Two convolutions over a window [num_mel_bins, num_frames], the second of stride 2; then positions.

    Returns:
        [(num_frames + 1) // 2, hidden].
    """
    x = F.gelu(conv1(_side_by_side(window.T, 1)))
    x = F.gelu(conv2(_side_by_side(x, 2)))
    return x + positions[: len(x)].to(x.dtype)


def _side_by_side(x: torch.Tensor, stride: int) -> torch.Tensor:
    """Every `stride`-th frame of [num_frames, n] between its neighbours: [.., 3 * n]; zeros at the ends."""
    padded = F.pad(x, (0, 0, 1, 1))
    count = (len(x) - 1) // stride + 1
    return torch.cat([padded[i : i + stride * (count - 1) + 1 : stride] for i in range(3)], dim=1)


def pool_pairs(x: torch.Tensor, features: Sequence[torch.Tensor]) -> torch.Tensor:
    """The mean of each two neighbouring tokens of a recording; an odd one at its end is left out."""
    parts = x.split([(one.shape[1] + 1) // 2 for one in features])
    return torch.cat([(part[:-1:2] + part[1::2]) / 2 for part in parts])


def sinusoids(length: int, channels: int) -> torch.Tensor:
    """Positions [length, channels] (Vaswani et al. 2017, section 3.5): sines, then cosines."""
    step = torch.log(torch.tensor(10000.0, dtype=torch.float64)) / (channels // 2 - 1)
    inverse = torch.exp(-step.float() * torch.arange(channels // 2).float())
    angles = torch.arange(length)[:, None] * inverse[None, :]
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def load_norm(load: TensorLoader, name: str, size: int) -> LayerNorm:
    return LayerNorm(load.vector(name + ".weight", size), load.vector(name + ".bias", size), NORM_EPS)


def _convolution(load: TensorLoader, name: str, rows: int, columns: int) -> Linear:
    kernel = load.weight(name + ".weight", (rows, columns, 3)).to_dense(load.dtype)
    weight = DenseTensor(kernel.transpose(1, 2).flatten(1).contiguous())
    return Linear([weight], load.vector(name + ".bias", rows))


def _load_layer(config: AudioConfig, load: TensorLoader, prefix: str) -> AudioLayer:
    attention, hidden, inner = prefix + "self_attn.", config.hidden_size, config.intermediate_size
    names = [attention + name for name in ("q_proj", "k_proj", "v_proj")]
    weights = [load.weight(name + ".weight", (hidden, hidden)) for name in names]
    query, value = (load.vector(names[i] + ".bias", hidden) for i in (0, 2))  # keys have none
    bias = torch.cat((query, torch.zeros_like(query), value))
    return AudioLayer(
        input_norm=load_norm(load, prefix + "self_attn_layer_norm", hidden),
        qkv=Linear(weights, bias, load.merge),
        out=load.linear([attention + "out_proj"], [hidden], hidden, True),
        post_norm=load_norm(load, prefix + "final_layer_norm", hidden),
        up=load.linear([prefix + "fc1"], [inner], hidden, True),
        down=load.linear([prefix + "fc2"], [hidden], inner, True),
    )
