"""Qwen2.5-VL's vision tower in plain torch: patches to embeddings (Bai et al. 2025, section 2.1)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812

from flexjudge_fast.layers.linear import Linear
from flexjudge_fast.layers.mlp import GatedMLP
from flexjudge_fast.layers.norm import RMSNorm
from flexjudge_fast.models.loader import TensorLoader
from flexjudge_fast.models.vision_config import VisionConfig
from flexjudge_fast.models.vision_layout import Grid, VisionLayout, lay_out
from flexjudge_fast.ops.backend import upload
from flexjudge_fast.ops.segment_attention import Segments, segment_attention
from flexjudge_fast.weights.tensor import DenseTensor

NORM_EPS = 1e-6  # not in config.json
PREFIXES = ("visual.", "model.visual.", "thinker.visual.")


@dataclass(frozen=True)
class VisionLayer:
    """Attention and MLP, each behind a norm, each added to the residual stream."""

    input_norm: RMSNorm
    qkv: Linear
    out: Linear
    post_norm: RMSNorm
    mlp: GatedMLP
    is_full: bool  # attends to whole frames, not to windows


class VisionTower:
    """`encode` turns patches into embeddings for the language model."""

    def __init__(self, config: VisionConfig, load: TensorLoader) -> None:
        self.config = config
        self.dtype, self.device = load.dtype, load.device
        prefix = load.prefix(PREFIXES, "patch_embed.proj.weight")
        hidden, size = config.hidden_size, config.patch_size
        kernel = load.weight(
            prefix + "patch_embed.proj.weight", (hidden, 3, config.temporal_patch_size, size, size)
        )
        # The convolution's steps are as long as its kernel: it is a product with each patch.
        self.patch_embed = Linear([DenseTensor(kernel.to_dense(load.dtype).flatten(1))])
        self.layers = [_load_layer(config, load, prefix, i) for i in range(config.num_layers)]
        self.merge_norm = RMSNorm(load.vector(prefix + "merger.ln_q.weight", hidden), NORM_EPS)
        merged = hidden * config.merged_patches
        self.merge_in = load.linear([prefix + "merger.mlp.0"], [merged], merged, True)
        self.merge_out = load.linear([prefix + "merger.mlp.2"], [config.out_hidden_size], merged, True)

    def encode(self, patches: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
        """Embeddings of some media.

        Args:
            patches: [num_patches, patch_elements] float32 on the CPU, as `ops.image.patchify` gives them.
            grids: of each medium, in the order of the patches.

        Returns:
            [num_patches / merged_patches, out_hidden_size] in the model's dtype.
        """
        layout = lay_out(grids, self.config)
        ordered = upload(in_window_order(patches, layout, self.config), self.device, self.dtype)
        merged = self._run(ordered, layout)
        out = torch.empty_like(merged)
        out[upload(layout.order, self.device)] = merged
        return out

    def _run(self, patches: torch.Tensor, layout: VisionLayout) -> torch.Tensor:
        cos_sin = upload(layout.cos, self.device), upload(layout.sin, self.device)
        residual = self.patch_embed(patches)  # [num_patches, hidden]
        frames, windows = (Segments.at(start, self.device) for start in (layout.frames, layout.windows))
        for layer in self.layers:
            segments = frames if layer.is_full else windows
            residual = residual + self._attend(layer, layer.input_norm(residual), cos_sin, segments)
            residual = residual + layer.mlp(layer.post_norm(residual))
        x = self.merge_norm(residual).unflatten(0, (-1, self.config.merged_patches)).flatten(1)
        embeddings: torch.Tensor = self.merge_out(F.gelu(self.merge_in(x)))
        return embeddings

    def _attend(
        self,
        layer: VisionLayer,
        x: torch.Tensor,
        cos_sin: tuple[torch.Tensor, torch.Tensor],
        segments: Segments,
    ) -> torch.Tensor:
        """x: [num_patches, hidden]."""
        heads = layer.qkv(x).unflatten(-1, (3, self.config.num_heads, -1))
        out: torch.Tensor = layer.out(segment_attention(heads, segments, cos_sin).flatten(1))
        return out


def in_window_order(patches: torch.Tensor, layout: VisionLayout, config: VisionConfig) -> torch.Tensor:
    """Patches [num_patches, patch_elements], those of a window side by side."""
    units: torch.Tensor = patches.unflatten(0, (-1, config.merged_patches))
    return units[layout.order].flatten(0, 1)


def _load_layer(config: VisionConfig, load: TensorLoader, prefix: str, index: int) -> VisionLayer:
    block = f"{prefix}blocks.{index}."
    attention, mlp = block + "attn.", block + "mlp."
    hidden, inner = config.hidden_size, config.intermediate_size
    return VisionLayer(
        input_norm=RMSNorm(load.vector(block + "norm1.weight", hidden), NORM_EPS),
        qkv=_load_qkv(load, attention, hidden),
        out=load.linear([attention + "proj"], [hidden], hidden, True),
        post_norm=RMSNorm(load.vector(block + "norm2.weight", hidden), NORM_EPS),
        mlp=GatedMLP(
            load.linear([mlp + "gate_proj", mlp + "up_proj"], [inner, inner], hidden, True),
            load.linear([mlp + "down_proj"], [hidden], inner, True),
        ),
        is_full=index in config.full_attention_layers,
    )


def _load_qkv(load: TensorLoader, prefix: str, hidden: int) -> Linear:
    """One matrix in Qwen2.5-VL, three in Qwen2.5-Omni."""
    if prefix + "qkv.weight" in load.checkpoint.tensor_names():
        return load.linear([prefix + "qkv"], [3 * hidden], hidden, True)
    return load.linear([prefix + name for name in "qkv"], [hidden] * 3, hidden, True)
