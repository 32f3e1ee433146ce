"""A Q-Former (Li et al. 2023, BLIP-2) over molecules: learned queries that attend to the blended rows."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from flexjudge_fast.layers.linear import Linear
from flexjudge_fast.layers.norm import LayerNorm
from flexjudge_fast.models.mol_llama_config import QFormerConfig
from flexjudge_fast.models.molecule_loader import EncoderLoader
from flexjudge_fast.models.molecule_rows import attend, gelu

PREFIX = "encoder.Qformer.bert."


@dataclass(frozen=True)
class QueryAttention:
    """Attention, added to what it started from, and normed."""

    query: Linear
    key: Linear
    value: Linear
    out: Linear
    norm: LayerNorm
    num_heads: int

    def __call__(
        self, x: torch.Tensor, other: torch.Tensor, sizes: tuple[Sequence[int], Sequence[int]]
    ) -> torch.Tensor:
        """x: [num_rows, hidden]; other: [num_other, width]; sizes: how many rows are each molecule's."""
        attended = attend(self.query(x), self.key(other), self.value(other), sizes, self.num_heads)
        return self.norm(self.out(attended) + x)


@dataclass(frozen=True)
class QFormerLayer:
    """Attention among the queries, to the molecule (in some layers), then two layers with GELU."""

    among: QueryAttention
    to_molecule: QueryAttention | None
    up: Linear
    down: Linear
    norm: LayerNorm


class QFormer:
    """`num_queries` rows for each molecule."""

    def __init__(self, load: EncoderLoader, config: QFormerConfig, width: int) -> None:
        self.config = config
        hidden = config.hidden_size
        name = "encoder.query_tokens"
        queries = load.weight(name, (1, config.num_queries, hidden)).to_dense(load.dtype)[0]
        norm = load.norm(PREFIX + "embeddings.LayerNorm", hidden, config.norm_eps)
        self.start = norm(queries)  # [num_queries, hidden]: the same for every molecule
        self.layers = [_load_layer(load, config, i, width) for i in range(config.num_layers)]

    def __call__(self, rows: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
        """rows: [num_rows, width] of all molecules; sizes: how many are each one's.

        Returns:
            [number of molecules * num_queries, hidden].
        """
        own = [self.config.num_queries] * len(sizes)
        x = self.start.repeat(len(sizes), 1)
        for layer in self.layers:
            x = layer.among(x, x, (own, own))
            if layer.to_molecule is not None:
                x = layer.to_molecule(x, rows, (own, sizes))
            x = layer.norm(layer.down(gelu(layer.up(x))) + x)
        return x


def _load_layer(load: EncoderLoader, config: QFormerConfig, index: int, width: int) -> QFormerLayer:
    prefix = f"{PREFIX}encoder.layer.{index}."
    hidden, inner = config.hidden_size, config.intermediate_size
    crosses = index % config.cross_attention_freq == 0
    return QFormerLayer(
        among=_load_attention(load, prefix + "attention.", config, hidden),
        to_molecule=_load_attention(load, prefix + "crossattention.", config, width) if crosses else None,
        up=load.linear([prefix + "intermediate_query.dense"], [inner], hidden),
        down=load.linear([prefix + "output_query.dense"], [hidden], inner),
        norm=load.norm(prefix + "output_query.LayerNorm", hidden, config.norm_eps),
    )


def _load_attention(load: EncoderLoader, prefix: str, config: QFormerConfig, width: int) -> QueryAttention:
    hidden = config.hidden_size
    return QueryAttention(
        query=load.linear([prefix + "self.query"], [hidden], hidden),
        key=load.linear([prefix + "self.key"], [hidden], width),
        value=load.linear([prefix + "self.value"], [hidden], width),
        out=load.linear([prefix + "output.dense"], [hidden], hidden),
        norm=load.norm(prefix + "output.LayerNorm", hidden, config.norm_eps),
        num_heads=config.num_heads,
    )
