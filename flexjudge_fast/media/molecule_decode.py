"""Reads untrusted molecules with RDKit; runs in the worker process only."""

from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from rdkit import Chem, RDLogger
from rdkit.Chem import rdDetermineBonds

from flexjudge_fast.errors import MediaError
from flexjudge_fast.media.conformer import place_atoms
from flexjudge_fast.media.molecule_features import bonds, node_features
from flexjudge_fast.media.molecule_limits import MoleculeLimits

_MOST_BOND_ORDERS = 100_000  # tried where bonds are told from places


def warm_up() -> None:
    """Reads molecules of each kind, so that no file need be opened afterwards."""
    RDLogger.DisableLog("rdApp.*")
    limits = MoleculeLimits()
    for smiles in ("CCO", "[Pt]", "C[SiH3]"):
        place_atoms(_from_smiles(smiles), limits)
    block = Chem.MolToMolBlock(Chem.MolFromSmiles("C"))
    _from_mol_block(block)
    _from_atoms(["H", "H"], [[0.0, 0.0, 0.0], [0.0, 0.0, 0.74]], 0)


def messages(file: BinaryIO, request: dict[str, Any]) -> Iterator[tuple[dict[str, Any], bytes]]:
    """That the molecule is understood; then what it is.

    Args:
        file: the text, or RDKit's binary form.
        request: `form` is "text", "binary" or "atoms"; `symbols`, `coordinates` and `charge` where they are
            given.
    """
    limits = MoleculeLimits(**request["limits"])
    file.seek(0)
    data = file.read(limits.max_bytes + 1)
    limits.check_file(len(data))
    mol, places = _parse(data, request, limits)
    yield {"parsed": True}, b""
    atoms, edges = node_features(mol), bonds(mol)
    symbols, coordinates = places or (_symbols(mol), place_atoms(mol, limits))
    payload = atoms.tobytes() + edges.tobytes() + np.ascontiguousarray(coordinates, "<f8").tobytes()
    yield {"molecule": symbols, "num_atoms": len(atoms), "num_bonds": len(edges)}, payload


_Places = tuple[list[str], NDArray[np.float64]]


def _parse(data: bytes, request: dict[str, Any], limits: MoleculeLimits) -> tuple[Any, _Places | None]:
    """The molecule without its hydrogens; and atoms with places, where they are known."""
    symbols: Any = request.get("symbols")
    coordinates: Any = request.get("coordinates")
    if request["form"] == "atoms":
        limits.check_atoms(sum(symbol != "H" for symbol in symbols), len(symbols))
        mol = _from_atoms(symbols, coordinates, request.get("charge", 0))
    elif request["form"] == "binary":
        mol = Chem.Mol(data)
        Chem.SanitizeMol(mol)
    else:
        mol = _from_text(data)
    limits.check_atoms(mol.GetNumHeavyAtoms(), mol.GetNumAtoms())
    places = None
    if coordinates is None and mol.GetNumConformers() and mol.GetConformer().Is3D():
        places = _symbols(mol), mol.GetConformer().GetPositions()
    plain = Chem.RemoveHs(mol)
    if coordinates is not None:
        places = _match(plain, symbols, coordinates)
    return plain, places


def _from_text(data: bytes) -> Any:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise MediaError("its text is not UTF-8") from error
    return _from_mol_block(text) if "\n" in text.strip() else _from_smiles(text.strip())


def _from_smiles(text: str) -> Any:
    if not text or any(char.isspace() for char in text):
        raise MediaError("a SMILES is one word")
    params = Chem.SmilesParserParams()
    params.allowCXSMILES = params.parseName = False
    mol = Chem.MolFromSmiles(text, params)
    if mol is None:
        params.sanitize = False
        raise MediaError(f"no SMILES: {_reason(Chem.MolFromSmiles(text, params))}")
    return mol


def _from_mol_block(text: str) -> Any:
    block, _, rest = text.partition("$$$$")
    if rest.strip():
        raise MediaError("it holds more than one molecule")
    mol = Chem.MolFromMolBlock(block, removeHs=False)
    if mol is None:
        raise MediaError(f"no MOL text: {_reason(Chem.MolFromMolBlock(block, sanitize=False))}")
    return mol


def _reason(mol: Any) -> str:
    """Why a molecule is none; `mol` is it, unchecked."""
    if mol is None:
        return "it cannot be parsed"
    problems = Chem.DetectChemistryProblems(mol)
    return problems[0].Message() if problems else "its atoms and bonds do not fit"


def _from_atoms(symbols: Sequence[str], coordinates: Sequence[Sequence[float]], charge: int) -> Any:
    """Bonds told from the places of all atoms (Kim and Kim 2015)."""
    if "H" not in symbols:
        raise MediaError("bonds are told from all atoms, hydrogen included; without it give the SMILES, too")
    mol = Chem.RWMol()
    places = Chem.Conformer(len(symbols))
    places.Set3D(True)
    for i, (symbol, place) in enumerate(zip(symbols, coordinates, strict=True)):
        if Chem.GetPeriodicTable().GetAtomicNumber(symbol) < 1:
            raise MediaError(f"{symbol!r} is no element")
        atom = Chem.Atom(symbol)
        atom.SetNoImplicit(True)
        mol.AddAtom(atom)
        places.SetAtomPosition(i, place)
    mol.AddConformer(places)
    try:
        rdDetermineBonds.DetermineBonds(mol, charge=charge, maxIterations=_MOST_BOND_ORDERS)
        Chem.SanitizeMol(mol)
    except (ValueError, RuntimeError) as error:
        raise MediaError(f"its bonds cannot be told from its atoms' places: {error}") from error
    if any(atom.GetNumRadicalElectrons() for atom in mol.GetAtoms()):
        raise MediaError("its bonds cannot be told from its atoms' places: electrons are left over")
    return mol


def _symbols(mol: Any) -> list[str]:
    return [atom.GetSymbol() for atom in mol.GetAtoms()]


def _match(mol: Any, symbols: list[str] | None, coordinates: Any) -> _Places:
    """Given places and whose they are; without symbols, of the molecule's heavy atoms in its order."""
    own = _symbols(mol)
    found = own if symbols is None else symbols
    if len(found) != len(coordinates):
        raise MediaError(f"{len(coordinates)} places for {len(found)} atoms")
    heavy = [sorted(symbol for symbol in names if symbol != "H") for names in (own, found)]
    if heavy[0] != heavy[1]:
        raise MediaError("the atoms with places are not those of the molecule")
    return found, np.array(coordinates, np.float64)
