"""Molecules to embeddings as in Mol-LLaMA (Kim et al. 2025): two encoders, blending, Q-Former, projection."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from flexjudge_fast.models.blending import Blending
from flexjudge_fast.models.mol_llama_config import MolLlamaConfig
from flexjudge_fast.models.molecule_graph import MoleculeGraph
from flexjudge_fast.models.molecule_loader import EncoderLoader
from flexjudge_fast.models.molecule_stm import MoleculeSTM
from flexjudge_fast.models.qformer import QFormer
from flexjudge_fast.models.unimol import UniMol
from flexjudge_fast.ops.backend import one_torch_thread

_MAX_PAIRS = 1 << 18  # of tokens in space, encoded at once: with 64 heads 64 MiB


@dataclass(frozen=True, eq=False)
class MoleculeStages:
    """What each part makes of some molecules, one behind the other. `graph`, `space`: the encoders' rows."""

    space: torch.Tensor  # [num_tokens in space, width]
    graph: torch.Tensor  # [1 + num_atoms of each, width]
    normed_space: torch.Tensor
    normed_graph: torch.Tensor
    blended: torch.Tensor  # [num_rows, hidden]: of each molecule the graph's rows, then those in space
    queries: torch.Tensor  # [num_molecules * num_queries, hidden]
    embeddings: torch.Tensor  # [num_molecules * num_queries, hidden of the language model]


class MoleculeEncoder:
    """`encode` gives `num_queries` embeddings for each molecule, in float32.

    A molecule's bits do not depend on the molecules beside it: compiled products give a row the same bits in
    any company, attention runs molecule by molecule, and nothing is padded. Products in plain torch promise
    no such thing; there each molecule is encoded alone.
    """

    def __init__(self, config: MolLlamaConfig, load: EncoderLoader, llm_hidden: int) -> None:
        self.config = config
        self.num_queries = config.qformer.num_queries
        self.is_compiled = load.num_threads is not None
        self.unimol = UniMol(load)
        self.stm = MoleculeSTM(load)
        widths = (self.stm.hidden, self.unimol.hidden)
        self.graph_norm = load.norm("encoder.ln_graph.moleculestm", widths[0])
        self.space_norm = load.norm("encoder.ln_graph.unimol", widths[1])
        self.blending = Blending(load, widths, config.blending_layers, config.blending_heads)
        self.qformer = QFormer(load, config.qformer, self.blending.hidden)
        self.proj = load.linear(["llm_proj"], [llm_hidden], config.qformer.hidden_size)

    def encode(self, graphs: Sequence[MoleculeGraph]) -> torch.Tensor:
        """[number of molecules * num_queries, hidden of the language model]."""
        # More threads would cut elementwise work at places that depend on the molecules beside.
        with torch.inference_mode(), one_torch_thread() if self.is_compiled else nullcontext():
            return torch.cat([self.stages(group).embeddings for group in self._groups(graphs)])

    def stages(self, graphs: Sequence[MoleculeGraph]) -> MoleculeStages:
        """Everything on the way, of molecules that are encoded together."""
        space, graph = self.unimol.encode(graphs), self.stm.encode(graphs)
        normed_space, normed_graph = self.space_norm(space), self.graph_norm(graph)
        sizes = [1 + len(one.node_features) for one in graphs], [len(one.tokens) for one in graphs]
        blended = self.blending(normed_graph, normed_space, sizes)
        queries = self.qformer(blended, [a + b for a, b in zip(*sizes, strict=True)])
        embeddings = self.proj(queries)
        return MoleculeStages(space, graph, normed_space, normed_graph, blended, queries, embeddings)

    def _groups(self, graphs: Sequence[MoleculeGraph]) -> Iterator[list[MoleculeGraph]]:
        """Molecules that are encoded together, in order."""
        group: list[MoleculeGraph] = []
        pairs = 0
        for graph in graphs:
            if group and (not self.is_compiled or pairs + graph.num_pairs > _MAX_PAIRS):
                yield group
                group, pairs = [], 0
            group.append(graph)
            pairs += graph.num_pairs
        if group:
            yield group
