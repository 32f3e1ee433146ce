"""A molecule's atoms and bonds as MoleculeSTM counts them (Hu et al. 2020, OGB); in the worker only."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from rdkit.Chem import BondStereo, BondType, ChiralType, HybridizationType

from flexjudge_fast.errors import MediaError

_CHIRALITIES = (
    ChiralType.CHI_UNSPECIFIED,
    ChiralType.CHI_TETRAHEDRAL_CW,
    ChiralType.CHI_TETRAHEDRAL_CCW,
    ChiralType.CHI_OTHER,
)
_HYBRIDISATIONS = (
    HybridizationType.SP,
    HybridizationType.SP2,
    HybridizationType.SP3,
    HybridizationType.SP3D,
    HybridizationType.SP3D2,
)
_BONDS = (BondType.SINGLE, BondType.DOUBLE, BondType.TRIPLE, BondType.AROMATIC)
_STEREO = (
    BondStereo.STEREONONE,
    BondStereo.STEREOZ,
    BondStereo.STEREOE,
    BondStereo.STEREOCIS,
    BondStereo.STEREOTRANS,
    BondStereo.STEREOANY,
)


def node_features(mol: Any) -> NDArray[np.int64]:
    """[num_atoms, 9]: element, chirality, neighbours, charge, hydrogens, radicals, hybridisation, aromatic,
    in a ring. What is not in a list has the index behind it."""
    rows = [_atom(atom) for atom in mol.GetAtoms()]
    return np.array(rows, np.int64).reshape(-1, 9)


def bonds(mol: Any) -> NDArray[np.int64]:
    """[num_bonds, 5]: both atoms, then type, stereo, conjugated. MediaError: stereo that has no index."""
    rows = [_bond(bond) for bond in mol.GetBonds()]
    return np.array(rows, np.int64).reshape(-1, 5)


def _atom(atom: Any) -> list[int]:
    element, chirality = atom.GetAtomicNum(), atom.GetChiralTag()
    hybridisation = atom.GetHybridization()
    return [
        element - 1 if 1 <= element <= 118 else 118,
        _CHIRALITIES.index(chirality) if chirality in _CHIRALITIES else 3,
        _counted(atom.GetTotalDegree(), 0, 10),
        _counted(atom.GetFormalCharge(), -5, 5),
        _counted(atom.GetTotalNumHs(), 0, 8),
        _counted(atom.GetNumRadicalElectrons(), 0, 4),
        _HYBRIDISATIONS.index(hybridisation) if hybridisation in _HYBRIDISATIONS else 5,
        int(atom.GetIsAromatic()),
        int(atom.IsInRing()),
    ]


def _counted(value: int, low: int, high: int) -> int:
    return value - low if low <= value <= high else high - low + 1


def _bond(bond: Any) -> list[int]:
    kind, stereo = bond.GetBondType(), bond.GetStereo()
    if stereo not in _STEREO:
        raise MediaError(f"a bond has the stereo {stereo}, which the encoder does not know")
    return [
        bond.GetBeginAtomIdx(),
        bond.GetEndAtomIdx(),
        _BONDS.index(kind) if kind in _BONDS else 4,
        _STEREO.index(stereo),
        int(bond.GetIsConjugated()),
    ]
