"""Molecules: placing 64 in space; encoding 64 at the published sizes, ours against plain torch one by one.

python -m bench.molecules [threads] [rounds]
"""

import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from bench.vision_models import InMemory
from flexjudge_fast.media.molecule_pool import MoleculeDecoder
from flexjudge_fast.models.mol_llama_config import MolLlamaConfig, QFormerConfig
from flexjudge_fast.models.molecule_encoder import MoleculeEncoder
from flexjudge_fast.models.molecule_graph import MoleculeGraph
from flexjudge_fast.models.molecule_loader import EncoderLoader
from flexjudge_fast.models.molecule_stm import EDGE_SIZES, NODE_SIZES
from flexjudge_fast.ops.backend import has_compiled_ops

COUNT, LLM_HIDDEN = 64, 4096
# Amides of 8 acids and 8 amines, with rings and chains as drugs have them: 19 to 41 heavy atoms.
ACIDS = (
    "CC(C)Cc1ccc(cc1)C(C)",
    "COc1ccc2cc(ccc2c1)C(C)",
    "Cc1onc(-c2ccccc2Cl)c1",
    "CC(=O)Oc1ccccc1",
    "Cc1c(Cl)cccc1Nc1ccccc1",
    "CC1(C)SC2C(NC(=O)Cc3ccccc3)C(=O)N2C1",
    "Cc1ccc(cc1)-c1cc(C)nn1-c1ccc(cc1)",
    "Clc1ccc(cc1)C1CCN(CC1)C",
)
AMINES = (
    "NCCc1ccc(O)c(O)c1",
    "N1CCN(CC1)c1ccccc1OC",
    "NC(C)C(O)c1ccccc1",
    "N1CCC(CC1)Oc1ccc(F)cc1",
    "NC1CCCCC1",
    "NCCCN1c2ccccc2CCc2ccccc21",
    "Nc1ccc(cc1)S(=O)(=O)Nc1ncccn1",
    "NCC(O)COc1cccc2ccccc12",
)
CONFIG = MolLlamaConfig("", 8, 32.0, 4, 8, QFormerConfig(8, 2, 12, 768, 12, 3072, 1e-12))
_UNIMOL, _STM = "encoder.graph_encoder.unimol.", "encoder.graph_encoder.moleculestm.molecule_node_model."
Shapes = dict[str, tuple[int, ...]]


def random_tensors(shapes: Shapes) -> dict[str, torch.Tensor]:
    """Norms near one, the rest small."""

    def draw(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if name.endswith("var") or (len(shape) == 1 and name.endswith("weight")):
            return torch.ones(shape)
        return torch.randn(shape) * (shape[-1] ** -0.5 if len(shape) > 1 else 0.1)

    return {name: draw(name, shape) for name, shape in shapes.items()}


def published_shapes() -> Shapes:
    """Every tensor of the molecule's way to embeddings."""
    shapes = _unimol(15, 512, 2048, 64, 128) | _stm(5, 300) | _blending(4, 512) | _qformer(12, 768, 3072, 512)
    shapes["encoder.query_tokens"] = (1, 8, 768)
    shapes |= _norm("encoder.ln_graph.moleculestm", 300) | _norm("encoder.ln_graph.unimol", 512)
    return shapes | _linear("llm_proj", LLM_HIDDEN, 768)


def _norm(name: str, size: int) -> Shapes:
    return {name + ".weight": (size,), name + ".bias": (size,)}


def _linear(name: str, rows: int, columns: int) -> Shapes:
    return {name + ".weight": (rows, columns), name + ".bias": (rows,)}


def _unimol(layers: int, hidden: int, inner: int, heads: int, count: int) -> Shapes:
    shapes: Shapes = {_UNIMOL + "embed_tokens.weight": (31, hidden)}
    shapes |= {_UNIMOL + f"gbf.{name}.weight": (961, 1) for name in ("mul", "bias")}
    shapes |= {_UNIMOL + f"gbf.{name}.weight": (1, count) for name in ("means", "stds")}
    shapes |= _linear(_UNIMOL + "gbf_proj.linear1", count, count)
    shapes |= _linear(_UNIMOL + "gbf_proj.linear2", heads, count)
    shapes |= _norm(_UNIMOL + "encoder.emb_layer_norm", hidden)
    shapes |= _norm(_UNIMOL + "encoder.final_layer_norm", hidden)
    for i in range(layers):
        prefix = f"{_UNIMOL}encoder.layers.{i}."
        shapes |= _norm(prefix + "self_attn_layer_norm", hidden) | _norm(prefix + "final_layer_norm", hidden)
        shapes |= _linear(prefix + "self_attn.in_proj", 3 * hidden, hidden)
        shapes |= _linear(prefix + "self_attn.out_proj", hidden, hidden)
        shapes |= _linear(prefix + "fc1", inner, hidden) | _linear(prefix + "fc2", hidden, inner)
    return shapes


def _stm(layers: int, hidden: int) -> Shapes:
    tables = {_STM + "atom_encoder.atom_embedding_list": NODE_SIZES}
    shapes: Shapes = {}
    for i in range(layers):
        prefix = f"{_STM}gnns.{i}."
        tables[prefix + "bond_encoder.bond_embedding_list"] = EDGE_SIZES
        shapes[prefix + "eps"] = (1,)
        shapes |= _linear(prefix + "mlp.0", 2 * hidden, hidden) | _linear(
            prefix + "mlp.3", hidden, 2 * hidden
        )
        for name, size in ((prefix + "mlp.1", 2 * hidden), (f"{_STM}batch_norms.{i}", hidden)):
            shapes |= {
                f"{name}.{part}": (size,) for part in ("weight", "bias", "running_mean", "running_var")
            }
    for name, sizes in tables.items():
        shapes |= {f"{name}.{i}.weight": (size, hidden) for i, size in enumerate(sizes)}
    return shapes


def _blending(layers: int, hidden: int) -> Shapes:
    prefix = "encoder.blending_module."
    shapes = _linear(prefix + "mlp.moleculestm.0", hidden, 300) | _linear(
        prefix + "mlp.unimol.0", hidden, 512
    )
    names = ("self_attn_block_2D", "self_attn_block_3D", "cross_attn_block_2Dto3D", "cross_attn_block_3Dto2D")
    for block in (f"{prefix}cross_attn_blocks.{i}.{name}." for i in range(layers) for name in names):
        shapes |= {
            block + "attn.in_proj_weight": (3 * hidden, hidden),
            block + "attn.in_proj_bias": (3 * hidden,),
        }
        shapes |= _linear(block + "attn.out_proj", hidden, hidden)
        shapes |= _linear(block + "mlp.0", 4 * hidden, hidden) | _linear(block + "mlp.2", hidden, 4 * hidden)
        for name in ("ln", "ln_q", "ln_k", "ln_v"):
            shapes |= _norm(block + name, hidden)
    return shapes


def _qformer(layers: int, hidden: int, inner: int, width: int) -> Shapes:
    prefix = "encoder.Qformer.bert."
    shapes = _norm(prefix + "embeddings.LayerNorm", hidden)
    for i in range(layers):
        layer = f"{prefix}encoder.layer.{i}."
        blocks = [("attention.", hidden)] + ([("crossattention.", width)] if i % 2 == 0 else [])
        for name, columns in blocks:
            shapes |= _linear(f"{layer}{name}self.query", hidden, hidden)
            for part in ("key", "value"):
                shapes |= _linear(f"{layer}{name}self.{part}", hidden, columns)
            shapes |= _linear(f"{layer}{name}output.dense", hidden, hidden)
            shapes |= _norm(f"{layer}{name}output.LayerNorm", hidden)
        shapes |= _linear(layer + "intermediate_query.dense", inner, hidden)
        shapes |= _linear(layer + "output_query.dense", hidden, inner)
        shapes |= _norm(layer + "output_query.LayerNorm", hidden)
    return shapes


def drug_like(rng: np.random.Generator) -> MoleculeGraph:
    """15 to 40 atoms, a tree of bonds and three rings; only the sizes matter."""
    count = int(rng.integers(15, 41))
    tree = [(i, int(rng.integers(max(0, i - 3), i))) for i in range(1, count)]
    bonds = tree + [(i, i + 5) for i in range(0, count - 6, count // 3)]
    edges = np.array([pair for i, j in bonds for pair in ((i, j), (j, i))]).T
    features = np.stack([rng.integers(0, size, count) for size in NODE_SIZES], 1)
    bond_features = np.stack([rng.integers(0, size, edges.shape[1]) for size in EDGE_SIZES], 1)
    tokens = np.array([1, *rng.integers(4, 8, count), 2])
    places = np.zeros((count + 2, 3))
    places[1:-1] = rng.normal(0, 3, (count, 3))
    return MoleculeGraph(tokens, places, features, edges, bond_features)


def place(num_workers: int) -> float:
    """Molecules a second that are parsed and placed in space, by so many processes that are already there."""
    smiles = [f"{acid}C(=O){amine}" for acid in ACIDS for amine in AMINES]
    with MoleculeDecoder(num_workers=num_workers) as decoder, ThreadPoolExecutor(num_workers) as threads:

        def read(text: str) -> None:
            decoder.decode(text.encode(), form="text")

        list(threads.map(read, ["C" * (i + 1) for i in range(4 * num_workers)]))  # the processes start
        start = time.perf_counter()
        list(threads.map(read, smiles))
        return len(smiles) / (time.perf_counter() - start)


def report(name: str, rates: list[float]) -> None:
    print(f"{name}: {statistics.median(rates):.1f} molecules/s ({min(rates):.1f} to {max(rates):.1f})")


def main(threads: int = 2, rounds: int = 3) -> None:
    counts = sorted({1, 2, os.cpu_count() or 1})
    placed: dict[int, list[float]] = {count: [] for count in counts}
    for _ in range(rounds):
        for count in counts:
            placed[count].append(place(count))
    for count in counts:
        report(f"placed in space by {count} process(es)", placed[count])
    compare_encoders(threads, rounds)


def compare_encoders(threads: int, rounds: int) -> None:
    if not has_compiled_ops():
        sys.exit("the compiled ops are not built here")
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    graphs = [drug_like(np.random.default_rng(seed)) for seed in range(COUNT)]
    encoders, checkpoint = {}, InMemory(random_tensors(published_shapes()))
    for name, count in (("plain torch, one by one", None), ("ours", threads)):
        load = EncoderLoader(checkpoint, torch.device("cpu"), count)
        encoders[name] = MoleculeEncoder(CONFIG, load, LLM_HIDDEN)
    samples: dict[str, list[float]] = {name: [] for name in encoders}
    found = {name: encoder.encode(graphs[:2]) for name, encoder in encoders.items()}
    print(f"largest difference {(found['ours'] - found['plain torch, one by one']).abs().max():.1e}")
    for _ in range(rounds):
        for name, encoder in encoders.items():
            time.sleep(0.2)  # idle threads of the other stop spinning
            start = time.perf_counter()
            encoder.encode(graphs)
            samples[name].append(COUNT / (time.perf_counter() - start))
    for name, values in samples.items():
        report(name, values)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
