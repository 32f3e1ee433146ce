"""Molecules from any source to a graph: what every kind of source becomes is defined here."""

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flexjudge_fast.errors import MediaError
from flexjudge_fast.media.items import MediaItem
from flexjudge_fast.media.keys import molecule_key
from flexjudge_fast.media.molecule_pool import DecodedMolecule, MoleculeDecoder, check_places
from flexjudge_fast.media.molecule_processor import MoleculeProcessor
from flexjudge_fast.media.prepared import PreparedMolecule
from flexjudge_fast.models.molecule_graph import MoleculeGraph

_SHOWN = 60  # characters of a text in an error
_FIELDS = ("smiles", "mol", "symbols", "coordinates", "charge")


def prepare_molecule(
    item: MediaItem, processor: MoleculeProcessor, decoder: MoleculeDecoder
) -> PreparedMolecule:
    """A molecule read and named by its content. Safe to call from several threads.

    Sources: a SMILES; the text of a MOL or SDF file with one molecule (whatever has more than one line); a
    `pathlib.Path` of a file with either; an `rdkit.Chem.Mol`; `(symbols, coordinates)` of all atoms,
    hydrogen included, whose bonds are told from their places; or a mapping with "smiles" or "mol" (text),
    "symbols", "coordinates" and "charge" (of the atoms, 0 if it is missing). With a text, given coordinates
    are those of its heavy atoms in its order, or of the atoms that "symbols" names.

    - Hydrogen is left out, unless there is nothing else; isotopes of it, too, in space.
    - Coordinates that are given in three dimensions are used as they are, else atoms are placed
      (`conformer.py`), the same way each time.
    - Several fragments in one SMILES are one molecule.

    Raises:
        MediaError: beginning with item.name and a description of the source.
        UnsupportedMediaError: RDKit is not installed.
    """
    try:
        graph = molecule_graph(_decode(item.source, decoder), processor)
    except MediaError as error:
        hint = _hint(item.source)
        raise MediaError(f"{item.name or item.kind}: {_describe(item.source)}: {error}{hint}") from error
    key = molecule_key(graph, processor)
    return PreparedMolecule("molecule", key, graph, processor.num_tokens)


def molecule_graph(molecule: DecodedMolecule, processor: MoleculeProcessor) -> MoleculeGraph:
    """As the encoders read it."""
    heavy = np.array([symbol != "H" for symbol in molecule.symbols])
    kept = heavy if heavy.any() else ~heavy
    places = molecule.coordinates[kept]
    ends = np.zeros((1, 3))
    first, second = molecule.bonds[:, 0], molecule.bonds[:, 1]
    both_ways = np.stack([first, second, second, first], 1).reshape(-1, 2)
    return MoleculeGraph(
        tokens=processor.tokens(
            [symbol for symbol, keep in zip(molecule.symbols, kept, strict=True) if keep]
        ),
        coordinates=np.concatenate([ends, places - places.mean(0), ends]),
        node_features=molecule.nodes,
        edge_index=np.ascontiguousarray(both_ways.T),
        edge_features=np.repeat(molecule.bonds[:, 2:], 2, axis=0),
    )


def _decode(source: object, decoder: MoleculeDecoder) -> DecodedMolecule:
    if isinstance(source, os.PathLike):
        return decoder.decode(source, form="text")
    if isinstance(source, str | bytes):
        return decoder.decode(_text(source), form="text")
    if _is_mol(source):
        return decoder.decode(_binary(source), form="binary")
    if isinstance(source, Mapping):
        return _from_mapping(source, decoder)
    if isinstance(source, tuple | list) and len(source) == 2:
        return _from_mapping({"symbols": source[0], "coordinates": source[1]}, decoder)
    raise MediaError(
        "it is no molecule; give a SMILES, MOL text, a Path, an rdkit.Chem.Mol, "
        "(symbols, coordinates) or a mapping"
    )


def _from_mapping(source: Mapping[str, Any], decoder: MoleculeDecoder) -> DecodedMolecule:
    for name in source:
        if name not in _FIELDS:
            raise MediaError(f"unknown field {name!r}; known are: {', '.join(_FIELDS)}")
    if "smiles" in source and "mol" in source:
        raise MediaError('give "smiles" or "mol", not both')
    given: dict[str, Any] = {}
    if source.get("coordinates") is not None:
        given["coordinates"] = _places(source["coordinates"])
        if source.get("symbols") is not None:
            given["symbols"] = _symbols(source["symbols"], len(given["coordinates"]))
    text = source.get("smiles", source.get("mol"))
    if text is not None:
        if "charge" in source:
            raise MediaError("a charge is given for atoms without a text only")
        if not isinstance(text, str):
            raise MediaError(f"a text is expected, not {type(text).__name__}")
        return decoder.decode(_text(text), form="text", **given)
    charge = source.get("charge", 0)
    if "symbols" not in given:
        raise MediaError('a mapping must have "smiles", "mol", or "symbols" and "coordinates"')
    if type(charge) is not int or abs(charge) > 100:
        raise MediaError(f"a charge of {charge!r}")
    return decoder.decode(b"atoms", form="atoms", charge=charge, **given)


def _text(text: str | bytes) -> bytes:
    try:
        data = text.encode() if isinstance(text, str) else text
    except UnicodeEncodeError as error:
        raise MediaError(f"{error.reason} at character {error.start}") from error
    if not data.strip():
        raise MediaError("it is empty")
    return data


def _places(given: object) -> list[list[float]]:
    try:
        array: NDArray[np.float64] = np.asarray(given, np.float64)
    except (ValueError, TypeError) as error:
        raise MediaError("coordinates: a list of [x, y, z] for each atom is expected") from error
    check_places(array)
    places: list[list[float]] = array.tolist()
    return places


def _symbols(given: object, count: int) -> list[str]:
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise MediaError(f"symbols: a list is expected, not {type(given).__name__}")
    for symbol in given:
        if not isinstance(symbol, str) or not symbol.isascii() or not symbol.isalpha() or len(symbol) > 3:
            raise MediaError(f"symbols: {symbol!r} is none")
    if len(given) != count:
        raise MediaError(f"{len(given)} symbols for {count} coordinates")
    return list(given)


def _is_mol(source: object) -> bool:
    """Without importing RDKit: whoever has a molecule of it has done so."""
    chem = sys.modules.get("rdkit.Chem.rdchem")
    return chem is not None and isinstance(source, chem.Mol)


def _binary(source: Any) -> bytes:
    from rdkit.Chem import PropertyPickleOptions

    return bytes(source.ToBinary(int(PropertyPickleOptions.CoordsAsDouble)))


def _hint(source: object) -> str:
    """For those who give a file's name as a string."""
    is_name = isinstance(source, str) and source.lower().endswith((".sdf", ".mol", ".smi", ".smiles"))
    return "; give a pathlib.Path to have a file read" if is_name else ""


def _describe(source: object) -> str:
    """A source in a few words, for messages."""
    if isinstance(source, Mapping):
        source = source.get("smiles", source.get("mol", source))
    if isinstance(source, os.PathLike):
        return repr(os.fspath(source))
    if isinstance(source, str) and "\n" in source.strip():
        return f"MOL text of {len(source)} characters"
    if isinstance(source, str):
        return repr(source) if len(source) <= _SHOWN else f"{source[:_SHOWN]!r}..."
    return type(source).__name__
