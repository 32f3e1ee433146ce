"""Reads what Mol-LLaMA's reference code gave: the copy in tests/data, or the full set outside."""

import functools
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from flexjudge_fast.models.molecule_graph import MoleculeGraph

REDUCED = Path(__file__).parent / "data" / "mol_llama"
SETS = ("reduced", "full")


def golden_folder(which: str) -> Path:
    """Of a set; skips the test if it is not here."""
    if which == "reduced":
        return REDUCED
    beside = Path(__file__).parents[2] / "shared" / "golden" / "mol_llama"
    folder = Path(os.environ.get("FLEXJUDGE_GOLDEN_MOL", beside))
    if not folder.exists():
        pytest.skip("the full set is neither in $FLEXJUDGE_GOLDEN_MOL nor in ../shared/golden/mol_llama")
    return folder


class Golden:
    """`tensor(name)` of cases.safetensors, and molecules."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cases = json.loads((folder / "cases.json").read_text())
        self.tensors = load_file(folder / "cases.safetensors")
        every = self.cases["cases"] + self.cases["extra_cases"]
        self.atoms = {case["name"]: case["atoms"] for case in every}

    @property
    def names(self) -> list[str]:
        """All molecules."""
        return list(self.atoms)

    def tensor(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def graph(self, name: str) -> MoleculeGraph:
        """From the golden coordinates and features."""
        heavy = [atom != "H" for atom in self.atoms[name]]
        places = self.tensor(f"{name}/coordinates").numpy()[heavy if any(heavy) else slice(None)]
        ends = np.zeros((1, 3))
        return MoleculeGraph(
            self.tensor(f"{name}/unimol_src_tokens").numpy(),
            np.concatenate([ends, places - places.mean(0), ends]),
            self.tensor(f"{name}/ogb_node_feat").numpy(),
            self.tensor(f"{name}/ogb_edge_index").numpy(),
            self.tensor(f"{name}/ogb_edge_feat").numpy(),
        )


@functools.cache
def golden(which: str) -> Golden:
    return Golden(golden_folder(which))
