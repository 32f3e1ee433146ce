"""MoleculeSTM's graph encoder (Liu et al. 2023): a GIN (Xu et al. 2019) over atoms and bonds."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from flexjudge_fast.layers.linear import Linear
from flexjudge_fast.models.molecule_graph import MoleculeGraph
from flexjudge_fast.models.molecule_loader import EncoderLoader

PREFIX = "encoder.graph_encoder.moleculestm.molecule_node_model."
NODE_SIZES = (119, 4, 12, 12, 10, 6, 6, 2, 2)  # values of each feature of an atom
EDGE_SIZES = (5, 6, 2)  # and of a bond
_EPS = 1e-5


class BatchNorm:
    """With the statistics of the training: a factor and a shift of each column."""

    def __init__(self, load: EncoderLoader, name: str, size: int) -> None:
        weight, bias, mean, variance = (
            load.vector(f"{name}.{part}", size).double()
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        factor = weight / (variance + _EPS).sqrt()
        self.factor, self.shift = factor.float(), (bias - mean * factor).float()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor + self.shift


@dataclass(frozen=True)
class GinLayer:
    """Neighbours' messages are summed, then two layers with norms are applied to each atom."""

    bonds: Sequence[torch.Tensor]  # of each feature, [num_values, hidden]
    own: torch.Tensor  # [1]: weight of the atom itself
    up: Linear
    inner_norm: BatchNorm
    down: Linear
    norm: BatchNorm


class MoleculeSTM:
    """`encode` gives a row for the whole molecule, then one for each atom."""

    def __init__(self, load: EncoderLoader) -> None:
        atoms = PREFIX + "atom_encoder.atom_embedding_list."
        self.hidden = load.shape(atoms + "0.weight")[1]
        self.atoms = _tables(load, atoms, NODE_SIZES, self.hidden)
        self.layers = [_load_layer(load, i, self.hidden) for i in range(load.count(PREFIX + "gnns."))]

    def encode(self, graphs: Sequence[MoleculeGraph]) -> torch.Tensor:
        """[number of atoms + 1 of all, hidden]."""
        nodes, sources, targets, edges = self._join(graphs)
        h = _look_up(self.atoms, nodes)
        for i, layer in enumerate(self.layers):
            messages = (h[sources] + _look_up(layer.bonds, edges)).relu_()
            x = (layer.own * h).index_add_(0, targets, messages)
            x = layer.down(layer.inner_norm(layer.up(x)).relu_())
            h = layer.norm(x)
            if i + 1 < len(self.layers):
                h = h.relu_()
        parts = h.split([len(graph.node_features) for graph in graphs])
        return torch.cat([row for part in parts for row in (part.mean(0, keepdim=True), part)])

    def _join(self, graphs: Sequence[MoleculeGraph]) -> tuple[torch.Tensor, ...]:
        """One graph of all: features of atoms, sources and targets of edges, features of edges."""
        edges, start = [], 0
        for graph in graphs:
            edges.append(torch.from_numpy(graph.edge_index) + start)
            start += len(graph.node_features)
        parts = (
            torch.cat([torch.from_numpy(graph.node_features) for graph in graphs]),
            *torch.cat(edges, dim=1),
            torch.cat([torch.from_numpy(graph.edge_features) for graph in graphs]),
        )
        return tuple(part.to(self.atoms[0].device) for part in parts)


def _look_up(tables: Sequence[torch.Tensor], features: torch.Tensor) -> torch.Tensor:
    """The sum of each feature's row. features: [n, number of tables]. Returns [n, hidden]."""
    first, *rest = (table[column] for table, column in zip(tables, features.unbind(1), strict=True))
    for rows in rest:
        first += rows
    return first


def _tables(load: EncoderLoader, prefix: str, sizes: Sequence[int], hidden: int) -> list[torch.Tensor]:
    return [load.table(f"{prefix}{i}.weight", size, hidden) for i, size in enumerate(sizes)]


def _load_layer(load: EncoderLoader, index: int, hidden: int) -> GinLayer:
    prefix = f"{PREFIX}gnns.{index}."
    inner = load.shape(prefix + "mlp.0.weight")[0]
    return GinLayer(
        bonds=_tables(load, prefix + "bond_encoder.bond_embedding_list.", EDGE_SIZES, hidden),
        own=1 + load.vector(prefix + "eps", 1),
        up=load.linear([prefix + "mlp.0"], [inner], hidden),
        inner_norm=BatchNorm(load, prefix + "mlp.1", inner),
        down=load.linear([prefix + "mlp.3"], [hidden], inner),
        norm=BatchNorm(load, f"{PREFIX}batch_norms.{index}", hidden),
    )
