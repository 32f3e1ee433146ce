"""A vision tower packed for the CPU kernels: the same `encode` as `VisionTower`, in one call into C++."""

from collections.abc import Iterable, Sequence

import torch

from flexjudge_fast.models.packer import Packer
from flexjudge_fast.models.vision_layout import Grid, lay_out
from flexjudge_fast.models.vision_tower import NORM_EPS, VisionTower, in_window_order
from flexjudge_fast.ops.vision import PackedVision, VisionPlan, run_vision
from flexjudge_fast.weights.tensor import Weight


class PackedVisionTower:
    """Takes the weights of `model`, loaded without merging. `num_threads`: threads of a pass."""

    def __init__(self, model: VisionTower, num_threads: int) -> None:
        config = self.config = model.config
        self.num_threads = num_threads
        packer = Packer(_weights(model))
        patch_embed = packer.linear(model.patch_embed)
        is_full = [layer.is_full for layer in model.layers]
        layers = []
        while model.layers:  # one at a time, so that only one is there in both forms
            layer = model.layers.pop(0)
            layers.append(packer.layer(layer.input_norm, layer.qkv, layer.out, layer.post_norm, layer.mlp))
        self.plan = VisionPlan(
            PackedVision(
                config.hidden_size,
                config.intermediate_size,
                config.num_heads,
                config.merged_patches,
                NORM_EPS,
                patch_embed,
                layers,
                is_full,
                model.merge_norm.weight.float(),
                packer.linear(model.merge_in),
                packer.linear(model.merge_out),
            )
        )

    def encode(self, patches: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
        """As `VisionTower.encode`; float32."""
        layout = lay_out(grids, self.config)
        ordered = in_window_order(patches, layout, self.config)
        angles = (layout.cos, layout.sin)
        merged = run_vision(self.plan, ordered, angles, layout.windows, layout.frames, self.num_threads)
        out = torch.empty_like(merged)
        out[layout.order] = merged
        return out


def _weights(model: VisionTower) -> Iterable[Weight]:
    for layer in model.layers:
        for linear in (layer.qkv, layer.out, layer.mlp.gate_up, layer.mlp.down):
            yield from linear.weights
    for linear in (model.patch_embed, model.merge_in, model.merge_out):
        yield from linear.weights
