"""Uni-Mol's molecular encoder (Zhou et al. 2023): atoms in space, distances as biases of the attention."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from flexjudge_fast.errors import UnsupportedCheckpointError
from flexjudge_fast.layers.linear import Linear
from flexjudge_fast.layers.norm import LayerNorm
from flexjudge_fast.models.molecule_graph import MoleculeGraph
from flexjudge_fast.models.molecule_loader import EncoderLoader
from flexjudge_fast.models.molecule_rows import gelu

PREFIX = "encoder.graph_encoder.unimol."
_PI = 3.14159  # as it was trained


@dataclass(frozen=True)
class UniMolLayer:
    """Attention, then two layers with GELU, each behind a norm, each added to the residual stream."""

    attention_norm: LayerNorm
    qkv: Linear
    out: Linear
    mlp_norm: LayerNorm
    up: Linear
    down: Linear


class UniMol:
    """`encode` gives a row for each token, CLS and SEP included."""

    def __init__(self, load: EncoderLoader) -> None:
        encoder = PREFIX + "encoder."
        self.num_tokens, self.hidden = load.shape(PREFIX + "embed_tokens.weight")
        self.embed = load.table(PREFIX + "embed_tokens.weight", self.num_tokens, self.hidden)
        self.embed_norm = load.norm(encoder + "emb_layer_norm", self.hidden)
        self.bias = PairBias(load, self.num_tokens)
        layers = encoder + "layers."
        self.layers = [_load_layer(load, f"{layers}{i}.", self.hidden) for i in range(load.count(layers))]
        self.final_norm = load.norm(encoder + "final_layer_norm", self.hidden)
        if self.hidden % self.bias.num_heads:
            raise UnsupportedCheckpointError(
                f"tensor {PREFIX}gbf_proj.linear2.weight: {self.bias.num_heads} heads do not divide the "
                f"width of {self.hidden}"
            )

    def encode(self, graphs: Sequence[MoleculeGraph]) -> torch.Tensor:
        """[num_tokens of all, hidden]."""
        device = self.embed.device
        tokens = [torch.from_numpy(graph.tokens).to(device) for graph in graphs]
        places = [torch.from_numpy(graph.coordinates).to(device) for graph in graphs]
        # Of each molecule [num_heads, n, n]: a layer's scores are the biases of the next.
        scores = [self.bias(ids, at) for ids, at in zip(tokens, places, strict=True)]
        x = self.embed_norm(self.embed[torch.cat(tokens)])
        for layer in self.layers:
            x = x + layer.out(self._attend(layer.qkv(layer.attention_norm(x)), scores))
            x = x + layer.down(gelu(layer.up(layer.mlp_norm(x))))
        return self.final_norm(x)

    def _attend(self, qkv: torch.Tensor, scores: list[torch.Tensor]) -> torch.Tensor:
        """[num_tokens, 3 * hidden] to [num_tokens, hidden]; `scores` become those of this layer."""
        head_dim = self.hidden // self.bias.num_heads
        parts = []
        for i, part in enumerate(qkv.split([bias.shape[1] for bias in scores])):
            query, key, value = part.unflatten(-1, (3, -1, head_dim)).permute(1, 2, 0, 3).contiguous()
            scores[i] = torch.baddbmm(scores[i], query * head_dim**-0.5, key.transpose(1, 2))
            parts.append(torch.bmm(scores[i].softmax(-1), value).transpose(0, 1).flatten(1))
        return torch.cat(parts)


class PairBias:
    """How much each head favours a pair of tokens, by their types and their distance.

    A distance, stretched and shifted by the pair's types, is measured by Gaussians; two layers make their
    densities a number a head.
    """

    def __init__(self, load: EncoderLoader, num_tokens: int) -> None:
        gaussians, projection = PREFIX + "gbf.", PREFIX + "gbf_proj."
        count = load.shape(gaussians + "means.weight")[-1]
        self.num_tokens = num_tokens
        self.num_heads = load.shape(projection + "linear2.weight")[0]
        self.scale = load.table(gaussians + "mul.weight", num_tokens**2, 1).squeeze(1)
        self.shift = load.table(gaussians + "bias.weight", num_tokens**2, 1).squeeze(1)
        self.means = load.table(gaussians + "means.weight", 1, count)
        self.widths = load.table(gaussians + "stds.weight", 1, count).abs() + 1e-5
        self.heights = (2 * _PI) ** 0.5 * self.widths
        self.up = load.linear([projection + "linear1"], [count], count)
        self.down = load.linear([projection + "linear2"], [self.num_heads], count)

    def __call__(self, tokens: torch.Tensor, coordinates: torch.Tensor) -> torch.Tensor:
        """tokens: [n]; coordinates: float64 [n, 3]. Returns [num_heads, n, n]."""
        count = len(tokens)
        offsets = coordinates[:, None] - coordinates[None]
        distances = offsets.square().sum(-1).sqrt().float().flatten()  # [n * n]
        types = (tokens[:, None] * self.num_tokens + tokens[None]).flatten()
        measured = self.scale[types] * distances + self.shift[types]
        z = (measured[:, None] - self.means) / self.widths  # [n * n, num_gaussians]
        densities = torch.exp(z.square().mul_(-0.5)) / self.heights
        heads = self.down(gelu(self.up(densities)))
        return heads.T.reshape(self.num_heads, count, count)


def _load_layer(load: EncoderLoader, prefix: str, hidden: int) -> UniMolLayer:
    attention = prefix + "self_attn."
    inner = load.shape(prefix + "fc1.weight")[0]
    return UniMolLayer(
        attention_norm=load.norm(prefix + "self_attn_layer_norm", hidden),
        qkv=load.linear([attention + "in_proj"], [3 * hidden], hidden),
        out=load.linear([attention + "out_proj"], [hidden], hidden),
        mlp_norm=load.norm(prefix + "final_layer_norm", hidden),  # so it is called in each layer
        up=load.linear([prefix + "fc1"], [inner], hidden),
        down=load.linear([prefix + "fc2"], [hidden], inner),
    )
