"""Mol-LLaMA's blending module (Kim et al. 2025): graph and atoms in space attend to each other."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from flexjudge_fast.errors import UnsupportedCheckpointError
from flexjudge_fast.layers.linear import Linear
from flexjudge_fast.layers.norm import LayerNorm
from flexjudge_fast.models.molecule_loader import EncoderLoader
from flexjudge_fast.models.molecule_rows import attend, gelu

PREFIX = "encoder.blending_module."
# In the order in which they are applied: a block's name, whether it updates the graph's rows (else the atoms
# in space), and whether it attends to them. The names of the last two say which way the writer saw it.
_STEPS = (
    ("self_attn_block_2D", True, True),
    ("self_attn_block_3D", False, False),
    ("cross_attn_block_3Dto2D", True, False),
    ("cross_attn_block_2Dto3D", False, True),
)


@dataclass(frozen=True)
class BlendingBlock:
    """Attention of some rows to some rows, then two layers with GELU, each added to the residual stream."""

    query_norm: LayerNorm
    key_norm: LayerNorm
    value_norm: LayerNorm
    query: Linear
    key: Linear
    value: Linear
    out: Linear
    mlp_norm: LayerNorm
    up: Linear
    down: Linear
    num_heads: int

    def __call__(
        self, x: torch.Tensor, other: torch.Tensor, sizes: tuple[Sequence[int], Sequence[int]]
    ) -> torch.Tensor:
        """x, other: [num_rows, hidden] of all molecules; sizes: how many are each one's."""
        query, key = self.query(self.query_norm(x)), self.key(self.key_norm(other))
        value = self.value(self.value_norm(other))
        x = x + self.out(attend(query, key, value, sizes, self.num_heads))
        return x + self.down(gelu(self.up(self.mlp_norm(x))))


class Blending:
    """Takes the encoders' rows, gives them blended, of one width."""

    def __init__(self, load: EncoderLoader, widths: tuple[int, int], num_layers: int, num_heads: int) -> None:
        blocks = PREFIX + "cross_attn_blocks."
        self.hidden = max(widths)
        self.graph_in, self.space_in = (
            load.linear([f"{PREFIX}mlp.{name}.0"], [self.hidden], width)
            for name, width in zip(("moleculestm", "unimol"), widths, strict=True)
        )
        if self.hidden % num_heads:
            raise UnsupportedCheckpointError(
                f"config field blending_module_config.num_heads: {num_heads} heads do not divide the width "
                f"of {self.hidden}"
            )
        if load.count(blocks) > num_layers:
            raise UnsupportedCheckpointError(
                f"config field blending_module_config.num_layers: {num_layers}, the checkpoint has "
                f"{load.count(blocks)}"
            )
        self.layers = [
            [_load_block(load, f"{blocks}{i}.{name}.", self.hidden, num_heads) for name, _, _ in _STEPS]
            for i in range(num_layers)
        ]

    def __call__(
        self, graph: torch.Tensor, space: torch.Tensor, sizes: tuple[Sequence[int], Sequence[int]]
    ) -> torch.Tensor:
        """The graph's rows, then the atoms in space, of the first molecule, then of the next.

        Args:
            graph: [num_graph_rows, width]; space: [num_space_rows, width].
            sizes: how many rows of each are each molecule's.

        Returns:
            [num_graph_rows + num_space_rows, hidden].
        """
        rows = {True: self.graph_in(graph), False: self.space_in(space)}
        counts = {True: sizes[0], False: sizes[1]}
        for layer in self.layers:
            for (_, updated, seen), block in zip(_STEPS, layer, strict=True):
                rows[updated] = block(rows[updated], rows[seen], (counts[updated], counts[seen]))
        both = zip(rows[True].split(list(sizes[0])), rows[False].split(list(sizes[1])), strict=True)
        return torch.cat([part for pair in both for part in pair])


def _load_block(load: EncoderLoader, prefix: str, hidden: int, num_heads: int) -> BlendingBlock:
    weights = load.table(prefix + "attn.in_proj_weight", 3 * hidden, hidden).chunk(3)
    biases = load.vector(prefix + "attn.in_proj_bias", 3 * hidden).chunk(3)
    query, key, value = map(load.product, weights, biases)
    inner = load.shape(prefix + "mlp.0.weight")[0]
    return BlendingBlock(
        query_norm=load.norm(prefix + "ln_q", hidden),
        key_norm=load.norm(prefix + "ln_k", hidden),
        value_norm=load.norm(prefix + "ln_v", hidden),
        query=query,
        key=key,
        value=value,
        out=load.linear([prefix + "attn.out_proj"], [hidden], hidden),
        mlp_norm=load.norm(prefix + "ln", hidden),
        up=load.linear([prefix + "mlp.0"], [inner], hidden),
        down=load.linear([prefix + "mlp.2"], [hidden], inner),
        num_heads=num_heads,
    )
