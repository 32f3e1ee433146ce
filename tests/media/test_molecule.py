"""Molecules from every source become the graph of the reference; what is broken or too large is refused."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from rdkit import Chem
from rdkit.Chem import rdDistGeom

from flexjudge_fast.errors import CheckpointError, EngineStateError, MediaError, UnsupportedMediaError
from flexjudge_fast.media import molecule_pool
from flexjudge_fast.media.items import MediaItem
from flexjudge_fast.media.molecule import prepare_molecule
from flexjudge_fast.media.molecule_limits import MoleculeLimits
from flexjudge_fast.media.molecule_pool import MoleculeDecoder
from flexjudge_fast.media.molecule_processor import MoleculeProcessor, read_molecule_processor
from tests.golden_molecules import SETS, golden, golden_folder

PROCESSOR = MoleculeProcessor(8)
IMPOSSIBLE = "C1#CC1"
WATER = ["O", "H", "H"], [[0.0, 0.0, 0.12], [0.0, 0.76, -0.48], [0.0, -0.76, -0.48]]


@pytest.fixture(scope="module")
def decoder():
    with MoleculeDecoder() as decoder:
        yield decoder


@pytest.fixture(params=SETS)
def gold(request):
    golden_folder(request.param)
    return golden(request.param)


def prepare(decoder, source):
    return prepare_molecule(MediaItem("molecule", source, "molecules[0]"), PROCESSOR, decoder)


def sources(gold):
    """Every molecule of the golden set, with its coordinates."""
    for case in gold.cases["cases"] + gold.cases["extra_cases"]:
        places = gold.tensor(f"{case['name']}/coordinates").tolist()
        yield case, {"smiles": case["smiles"], "symbols": case["atoms"], "coordinates": places}


def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(vars(one).values(), vars(other).values(), strict=True))


def test_features_are_those_of_the_reference(decoder, gold):
    for case, source in sources(gold):
        name, graph = case["name"], prepare(decoder, source).graph
        assert np.array_equal(graph.tokens, gold.tensor(f"{name}/unimol_src_tokens"))
        assert np.array_equal(graph.node_features, gold.tensor(f"{name}/ogb_node_feat"))
        assert np.array_equal(graph.edge_index, gold.tensor(f"{name}/ogb_edge_index"))
        assert np.array_equal(graph.edge_features, gold.tensor(f"{name}/ogb_edge_feat"))
        assert same(graph, gold.graph(name))


def test_distances_and_pairs_are_those_of_the_reference(decoder):
    golden_folder("full")
    gold = golden("full")
    for case, source in sources(gold):
        graph = prepare(decoder, source).graph
        places = graph.coordinates
        distances = np.linalg.norm(places[:, None] - places[None], axis=-1).astype(np.float32)
        assert np.array_equal(distances, gold.tensor(f"{case['name']}/unimol_src_distance"))
        pairs = graph.tokens[:, None] * 31 + graph.tokens
        assert np.array_equal(pairs, gold.tensor(f"{case['name']}/unimol_src_edge_type"))


def test_conformers_are_always_the_same(decoder, gold):
    """And those of the reference data, whose coordinates were made in this way, on the same RDKit."""
    with MoleculeDecoder() as other:
        for case, _ in sources(gold):
            found = prepare(decoder, case["smiles"])
            assert prepare(other, case["smiles"]).key == found.key
            if "with_h" in case or case["name"] == "cisplatin_like":  # placed by hand
                continue
            heavy = [i for i, atom in enumerate(case["atoms"]) if atom != "H"]
            wanted = gold.tensor(f"{case['name']}/coordinates").numpy()[heavy]
            assert np.abs(found.graph.coordinates[1:-1] - (wanted - wanted.mean(0))).max() < 1e-3


def test_sources_of_one_molecule(decoder, tmp_path):
    mol = Chem.AddHs(Chem.MolFromSmiles("C[C@H](N)C(=O)O"))
    rdDistGeom.EmbedMolecule(mol, randomSeed=7)
    block = Chem.MolToMolBlock(mol)
    path = tmp_path / "alanine.sdf"
    path.write_text(block + "$$$$\n")
    from_block = [prepare(decoder, source) for source in (block, block.encode(), path, block + "$$$$\n")]
    assert len({molecule.key for molecule in from_block}) == 1
    places = mol.GetConformer().GetPositions()
    symbols = [atom.GetSymbol() for atom in mol.GetAtoms()]
    given = [mol, (symbols, places), [symbols, places.tolist()], {"symbols": symbols, "coordinates": places}]
    given.append({"smiles": "C[C@H](N)C(=O)O", "symbols": symbols, "coordinates": places})
    given.append({"smiles": "C[C@H](N)C(=O)O", "coordinates": places[:6]})
    found = [prepare(decoder, source).graph for source in given]
    for graph in found:
        assert np.array_equal(graph.coordinates, found[0].coordinates)
        assert np.array_equal(graph.tokens, found[0].tokens)
        assert np.array_equal(graph.node_features, found[0].node_features)
    assert np.abs(found[0].coordinates - from_block[0].graph.coordinates).max() < 1e-3  # four decimals
    flat = Chem.MolFromSmiles("CCO")
    assert prepare(decoder, flat).key == prepare(decoder, "CCO").key
    assert prepare(decoder, Chem.MolToMolBlock(flat)).key == prepare(decoder, "CCO").key


def test_fragments_ions_and_hydrogen(decoder):
    salt = prepare(decoder, "[Na+].[Cl-]").graph
    assert len(salt.tokens) == 4 and np.abs(np.diff(salt.coordinates[1:3], axis=0)).max() > 0.5
    assert len(prepare(decoder, "CC(=O)[O-].[Na+]").graph.tokens) == 7
    hydrogen = prepare(decoder, "[H][H]").graph
    assert hydrogen.tokens.tolist() == [1, 8, 8, 2]
    heavy = prepare(decoder, "[2H]C([2H])O").graph  # isotopes are atoms of the graph, not in space
    assert len(heavy.tokens) == 4 and len(heavy.node_features) == 4
    assert prepare(decoder, WATER).graph.tokens.tolist() == [1, 6, 2]
    charged = {"symbols": ["O", "H"], "coordinates": [[0.0, 0, 0], [0.97, 0, 0]], "charge": -1}
    assert prepare(decoder, charged).graph.node_features[0, 3] == 4


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "it is empty"),
        (" \n ", "it is empty"),
        ("CCX", "'CCX': no SMILES: it cannot be parsed"),
        ("C1CC", "no SMILES"),
        ("C(C)(C)(C)(C)C", "valence for atom # 0 C, 5"),
        ("c1cccc1", "kekulize|no SMILES"),
        ("CCO ethanol", "a SMILES is one word"),
        ("CC |(0,0,0;1,1,1)|", "a SMILES is one word"),
        ("/none/a.mol", "no SMILES: .*; give a pathlib.Path to have a file read"),
        ((["C", "O"], [[0.0, 0, 0], [1.0]]), r"a list of \[x, y, z\] for each atom"),
        (Path("/none/a.mol"), "'/none/a.mol': it cannot be opened: No such file"),
        (Path("/dev/zero"), "not a regular file"),
        ("C" * 600, "600 heavy atoms are more than the 512 allowed"),
        ("C" * 300_000, "300,000 bytes are more than the 262,144 allowed"),
        ("C\ud800", "surrogates not allowed at character 1"),
        (b"\xff\xfe", "not UTF-8"),
        ("no\nmol\ntext\n", "MOL text of 12 characters: no MOL text"),
        (None, "NoneType: it is no molecule; give a SMILES"),
        (3.5, "float: it is no molecule"),
        (["C"], "list: it is no molecule"),
        ({"smiles": "C", "mol": "C"}, "not both"),
        ({"smile": "C"}, "unknown field 'smile'"),
        ({}, "must have"),
        ({"smiles": 3}, "a text is expected"),
        ({"smiles": "CO", "coordinates": [[0, 0, 0]]}, "1 places for 2 atoms"),
        ({"smiles": "CO", "symbols": ["C", "N"], "coordinates": [[0, 0, 0], [1, 0, 0]]}, "not those of"),
        ((["C"], [[0.0, 0.0, float("nan")]]), "not finite"),
        ((["C"], [[0.0, 0.0, 1e9]]), "not finite, or beyond"),
        ((["C"], [[0.0, 0.0]]), r"shape \[1, 2\]"),
        ((["C"], "x"), "coordinates"),
        ((["C", "H"], [[0.0, 0.0, 0.0]]), "2 symbols for 1 coordinates"),
        ((["C", "H"], [[0.0, 0.0, 0.0]] * 2), "all atoms are at the same place"),
        ((["Xx", "H"], [[0.0, 0, 0], [1, 0, 0]]), "Xx"),
        ((["C1", "H"], [[0.0, 0, 0], [1, 0, 0]]), "'C1' is none"),
        ((["C", "C"], [[0.0, 0, 0], [1.3, 0, 0]]), "hydrogen included"),
        ((["O", "H"], [[0.0, 0, 0], [0.97, 0, 0]]), "bonds cannot be told"),
    ],
)
def test_what_is_refused(decoder, source, message):
    started = time.monotonic()
    with pytest.raises(MediaError, match=rf"(?s)^molecules\[0\]: .*({message})"):
        prepare(decoder, source)
    assert time.monotonic() - started < 5  # the first starts a process


def test_more_than_one_molecule(decoder):
    block = Chem.MolToMolBlock(Chem.MolFromSmiles("C"))
    with pytest.raises(MediaError, match="more than one molecule"):
        prepare(decoder, f"{block}$$$$\n{block}$$$$\n")


def test_limits():
    with MoleculeDecoder(MoleculeLimits(max_atoms=3)) as decoder:
        assert len(prepare(decoder, "CCO").graph.tokens) == 5
        with pytest.raises(MediaError, match="4 heavy atoms are more than the 3"):
            prepare(decoder, "CCCC")
    with MoleculeDecoder(MoleculeLimits(max_attempts=2)) as decoder, pytest.raises(MediaError) as error:
        prepare(decoder, IMPOSSIBLE)
    assert str(error.value).startswith(f"molecules[0]: '{IMPOSSIBLE}': its atoms cannot be placed in space")


def test_small_molecules_get_fewer_attempts():
    limits = MoleculeLimits()
    assert [limits.attempts(n) for n in (0, 10, 20, 50, 500)] == [10, 10, 20, 50, 50]
    assert MoleculeLimits(max_attempts=2).attempts(20) == 2


def test_after_a_fork(decoder):
    """What another thread of the parent was holding then is not waited for."""
    with MoleculeDecoder(num_workers=1) as other:
        other._finding.acquire()
        other._pid -= 1
        assert len(prepare(other, "CCO").graph.tokens) == 5


def test_hangs_end_the_process_alone(decoder):
    with MoleculeDecoder(MoleculeLimits(parse_timeout=0.3), num_workers=1) as other:
        prepare(other, "C")
        (worker,) = other._all
        os.kill(worker.process.pid, signal.SIGSTOP)
        with pytest.raises(MediaError, match=r"parsing takes longer than 0\.3 s"):
            prepare(other, "CCO")
        assert len(prepare(other, "CCO").graph.tokens) == 5
    tangled = "".join(f"C%{i}" for i in range(10, 100)) * 2
    with MoleculeDecoder(MoleculeLimits(timeout=1)) as other:
        started = time.monotonic()
        with pytest.raises(MediaError, match=r"takes longer than 1 s|cannot be placed"):
            prepare(other, tangled)
        assert time.monotonic() - started < 10
    assert prepare(decoder, "CCO").num_tokens == 8


def test_a_crash_is_an_error(monkeypatch):
    with MoleculeDecoder(num_workers=1) as decoder:
        prepare(decoder, "CCO")
        (worker,) = decoder._all
        worker.process.kill()
        worker.process.wait()
        assert len(prepare(decoder, "CCC").graph.tokens) == 5  # found out, and another one started
        (worker,) = decoder._all
        take = molecule_pool._Reply.take

        def killed(self, peer, deadline):
            worker.process.kill()
            worker.process.wait()
            take(self, peer, deadline)
            take(self, peer, deadline)

        monkeypatch.setattr(molecule_pool._Reply, "take", killed)
        with pytest.raises(MediaError, match=r"molecules\[0\]: 'CCCC': the process .* crashed \(SIGKILL\)"):
            prepare(decoder, "C" * 4)
        monkeypatch.undo()
        assert len(prepare(decoder, "CCCC").graph.tokens) == 6
    with pytest.raises(EngineStateError):
        prepare(decoder, "CCCCC")


def test_atoms_are_placed_once(decoder, monkeypatch):
    calls = []
    decode = MoleculeDecoder._decode
    monkeypatch.setattr(
        MoleculeDecoder, "_decode", lambda self, *given: calls.append(given) or decode(self, *given)
    )
    threads = [threading.Thread(target=prepare, args=(decoder, "CCCCCCCO")) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    for _ in range(2):
        with pytest.raises(MediaError):
            prepare(decoder, "CCCCCCCX")
    assert len(calls) == 3  # errors are not kept


def test_without_rdkit(decoder, monkeypatch):
    monkeypatch.setattr(molecule_pool, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "modules", {k: v for k, v in sys.modules.items() if k.split(".")[0] != "rdkit"})
    with pytest.raises(UnsupportedMediaError, match=r"pip install .flexjudge_fast\[molecules\]"):
        prepare(decoder, "CCS")


def test_dictionary(tmp_path):
    assert read_molecule_processor(tmp_path, 8, 31) == PROCESSOR
    (tmp_path / "unimol").mkdir()
    path = tmp_path / "unimol" / "mol.dict.txt"
    path.write_text("\n".join(PROCESSOR.symbols))
    assert read_molecule_processor(tmp_path, 8, 31) == PROCESSOR
    path.write_text("[PAD] 1\n[CLS] 1\n[SEP] 1\n[UNK] 1\nO 1\n")
    assert read_molecule_processor(tmp_path, 8, 6).tokens(["O", "C"]).tolist() == [1, 4, 3, 2]
    for text in ("[CLS]\n[SEP]\nC\n", "[PAD]\n[CLS]\n[SEP]\n[UNK]\nC\nC\n", "[PAD]\n[CLS]\n[SEP]\n[UNK]\n"):
        path.write_text(text)
        with pytest.raises(CheckpointError):
            read_molecule_processor(tmp_path, 8, 31)
