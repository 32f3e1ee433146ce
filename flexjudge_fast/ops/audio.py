"""An audio tower's transformer layers in one call on the CPU."""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from flexjudge_fast.ops.plan import PackedLinear, float_number, linear_numbers, open_plan


@dataclass(frozen=True, eq=False)
class PackedNorm:
    """A layer norm: float32 [hidden] each."""

    weight: torch.Tensor
    bias: torch.Tensor


@dataclass(frozen=True, eq=False)
class PackedAudioLayer:
    """Attention, then two layers with GELU, each behind a norm."""

    input_norm: PackedNorm
    qkv: PackedLinear
    out: PackedLinear
    post_norm: PackedNorm
    up: PackedLinear
    down: PackedLinear


@dataclass(frozen=True, eq=False)
class PackedAudio:
    """The layers of an audio tower."""

    hidden_size: int
    num_heads: int
    norm_eps: float
    layers: Sequence[PackedAudioLayer]


class AudioPlan:
    """The layers as the compiled op reads them. Keeps the weights alive."""

    def __init__(self, model: PackedAudio) -> None:
        self.model = model
        numbers = [model.hidden_size, model.num_heads, float_number(model.norm_eps), len(model.layers)]
        for layer in model.layers:
            numbers += [*_norm(layer.input_norm), *linear_numbers(layer.qkv), *linear_numbers(layer.out)]
            numbers += [*_norm(layer.post_norm), *linear_numbers(layer.up), *linear_numbers(layer.down)]
        self.handle = open_plan(torch.ops.flexjudge.open_audio, numbers)
        freed = weakref.finalize(self, torch.ops.flexjudge.close_audio, self.handle)
        freed.atexit = False  # another thread may still be in a pass then

    def __reduce__(self) -> str:
        raise TypeError("an audio plan holds an address and cannot be copied")


def run_audio(plan: AudioPlan, hidden: torch.Tensor, windows: torch.Tensor, threads: int) -> torch.Tensor:
    """Every layer over some recordings. Its reference is the plain torch `AudioTower`.

    Args:
        hidden: [num_tokens, hidden] float32, contiguous.
        windows: int64 offsets [count + 1]: which tokens attend to each other.

    Returns:
        A new tensor of the same shape. A recording's bits do not depend on the recordings beside it, nor on
        `threads`.
    """
    out = hidden.clone()
    torch.ops.flexjudge.audio(plan.handle, out, windows, threads)
    return out


def _norm(norm: PackedNorm) -> list[int]:
    return [norm.weight.data_ptr(), norm.bias.data_ptr()]
