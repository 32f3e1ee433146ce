"""A whole vision tower in one call on the CPU: patches in, embeddings out."""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from flexjudge_fast.ops.plan import (
    PackedLayer,
    PackedLinear,
    float_number,
    layer_numbers,
    linear_numbers,
    open_plan,
)


@dataclass(frozen=True, eq=False)
class PackedVision:
    """A vision tower's weights and sizes; norms are float32. `is_full`: a layer attends to whole frames."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    merge: int  # patches that become one embedding
    rms_norm_eps: float
    patch_embed: PackedLinear
    layers: Sequence[PackedLayer]
    is_full: Sequence[bool]
    merge_norm: torch.Tensor
    merge_in: PackedLinear
    merge_out: PackedLinear


class VisionPlan:
    """The tower as the compiled op reads it. Keeps the weights alive."""

    def __init__(self, model: PackedVision) -> None:
        self.model = model
        numbers = [model.hidden_size, model.intermediate_size, model.num_heads, model.merge]
        numbers += [float_number(model.rms_norm_eps), *linear_numbers(model.patch_embed), len(model.layers)]
        for is_full, layer in zip(model.is_full, model.layers, strict=True):
            numbers += [int(is_full), *layer_numbers(layer)]
        numbers += [
            model.merge_norm.data_ptr(),
            *linear_numbers(model.merge_in),
            *linear_numbers(model.merge_out),
        ]
        self.handle = open_plan(torch.ops.flexjudge.open_vision, numbers)
        freed = weakref.finalize(self, torch.ops.flexjudge.close_vision, self.handle)
        freed.atexit = False  # another thread may still be in a pass then

    def __reduce__(self) -> str:
        raise TypeError("a vision plan holds an address and cannot be copied")


def run_vision(
    plan: VisionPlan,
    patches: torch.Tensor,
    cos_sin: tuple[torch.Tensor, torch.Tensor],
    windows: torch.Tensor,
    frames: torch.Tensor,
    threads: int,
) -> torch.Tensor:
    """Embed the patches, run every layer, and merge. Its reference is the plain torch `VisionTower`.

    Args:
        patches: [num_patches, patch_size] float32, those of a window side by side.
        cos_sin: [num_patches, head_dim / 2] float32 each.
        windows, frames: int64 offsets [count + 1]: which patches attend to each other.

    Returns:
        [num_patches / merge, hidden of the language model] float32, in the order of `patches`. The bits of a
        medium do not depend on the media beside it, nor on `threads`.
    """
    out: torch.Tensor = torch.ops.flexjudge.vision(plan.handle, patches, *cos_sin, windows, frames, threads)
    return out
