"""Places a molecule's atoms in space: ETKDGv3 (Wang et al. 2020), then a force field; in the worker only."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from rdkit import Chem
from rdkit.Chem import rdDistGeom, rdForceFieldHelpers

from flexjudge_fast.errors import MediaError
from flexjudge_fast.media.molecule_limits import MoleculeLimits

SEED = 42


def place_atoms(mol: Any, limits: MoleculeLimits) -> NDArray[np.float64]:
    """[num_atoms, 3] in Angstrom, of the atoms that `mol` names; the same for the same molecule.

    Hydrogens are added for this and left out again. MMFF94 moves the atoms to rest, UFF where MMFF94 does
    not know one of them; where UFF does not either, they stay as ETKDGv3 has placed them.

    Raises:
        MediaError: the atoms cannot be placed.
    """
    whole = Chem.AddHs(mol)
    limits.check_atoms(0, whole.GetNumAtoms())
    ways = [(False, True), (True, True)]
    if len(Chem.GetMolFrags(whole)) > 1:
        ways.append((True, False))
    attempts = limits.attempts(mol.GetNumHeavyAtoms())
    if not any(_embed(whole, attempts, limits.timeout, *way) for way in ways):
        raise MediaError(f"its atoms cannot be placed in space, in {len(ways)} x {attempts} attempts")
    if rdForceFieldHelpers.MMFFHasAllMoleculeParams(whole):
        rdForceFieldHelpers.MMFFOptimizeMolecule(whole)
    elif rdForceFieldHelpers.UFFHasAllMoleculeParams(whole):
        rdForceFieldHelpers.UFFOptimizeMolecule(whole)
    places: NDArray[np.float64] = whole.GetConformer().GetPositions()
    return places[: mol.GetNumAtoms()]


def _embed(
    whole: Any, attempts: int, timeout: float, from_random_places: bool, fragments_apart: bool
) -> bool:
    """Whether the atoms were placed. Fragments that are placed by themselves may lie in each other, as for
    the model's training; but ions of one atom each would all lie at one place, which is none."""
    params = rdDistGeom.ETKDGv3()
    params.randomSeed = SEED
    params.maxIterations = attempts
    params.useRandomCoords = from_random_places
    params.embedFragmentsSeparately = fragments_apart
    params.timeout = max(int(timeout), 1)
    if rdDistGeom.EmbedMolecule(whole, params) < 0:
        return False
    places = whole.GetConformer().GetPositions()
    return len(places) == 1 or bool((places != places[0]).any())
