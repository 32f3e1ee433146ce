"""An audio tower packed for the CPU kernels: the same `encode` as `AudioTower`, its layers in one call."""

from collections.abc import Iterable, Sequence

import torch

from flexjudge_fast.layers.norm import LayerNorm
from flexjudge_fast.models.audio_tower import (
    NORM_EPS,
    AudioLayer,
    AudioTower,
    cut_windows,
    embed_window,
    pool_pairs,
)
from flexjudge_fast.models.packer import Packer
from flexjudge_fast.ops.audio import AudioPlan, PackedAudio, PackedAudioLayer, PackedNorm, run_audio
from flexjudge_fast.ops.packed import packed_linear
from flexjudge_fast.ops.plan import PackedLinear
from flexjudge_fast.weights.tensor import Weight

_PLAIN_TERMS = 2  # bytes of a quantised activation; the tower's weights are plain, so it has none


class PackedAudioTower:
    """Takes the weights of `model`, loaded without merging. `num_threads`: threads of a pass."""

    def __init__(self, model: AudioTower, num_threads: int) -> None:
        self.config = model.config
        self.num_threads = num_threads
        packer = Packer(_weights(model))
        self._conv1, self._conv2 = packer.linear(model.conv1), packer.linear(model.conv2)
        self._positions = model.positions
        layers = []
        while model.layers:  # one at a time, so that only one is there in both forms
            layers.append(_pack_layer(packer, model.layers.pop(0)))
        self.plan = AudioPlan(PackedAudio(self.config.hidden_size, self.config.num_heads, NORM_EPS, layers))
        self._post_norm = LayerNorm(model.post_norm.weight.float(), model.post_norm.bias.float(), NORM_EPS)
        self._proj = packer.linear(model.proj)

    def encode(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        """As `AudioTower.encode`; float32."""
        windows, starts = cut_windows(features, self.config.window)
        conv1, conv2 = (lambda x: self._apply(self._conv1, x)), (lambda x: self._apply(self._conv2, x))
        embedded = [embed_window(window, conv1, conv2, self._positions) for window in windows]
        x = run_audio(self.plan, torch.cat(embedded), starts, self.num_threads)
        return self._apply(self._proj, self._post_norm(pool_pairs(x, features)))

    def _apply(self, linear: PackedLinear, x: torch.Tensor) -> torch.Tensor:
        (weight,) = linear.parts
        out = packed_linear(x.contiguous(), weight, _PLAIN_TERMS, self.num_threads)
        return out if linear.bias is None else out + linear.bias


def _pack_layer(packer: Packer, layer: AudioLayer) -> PackedAudioLayer:
    return PackedAudioLayer(
        input_norm=_norm(layer.input_norm),
        qkv=packer.linear(layer.qkv),
        out=packer.linear(layer.out),
        post_norm=_norm(layer.post_norm),
        up=packer.linear(layer.up),
        down=packer.linear(layer.down),
    )


def _norm(norm: LayerNorm) -> PackedNorm:
    return PackedNorm(norm.weight.float(), norm.bias.float())


def _weights(model: AudioTower) -> Iterable[Weight]:
    for layer in model.layers:
        for linear in (layer.qkv, layer.out, layer.up, layer.down):
            yield from linear.weights
    for linear in (model.conv1, model.conv2, model.proj):
        yield from linear.weights
