"""How a checkpoint names atoms: Uni-Mol's dictionary (Zhou et al. 2023)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flexjudge_fast.errors import CheckpointError

_SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "[UNK]")
_ELEMENTS = "C N O S H Cl F Br I Si P B Na K Al Ca Sn As Hg Fe Zn Cr Se Gd Au Li"
_SYMBOLS = (*_SPECIAL, *_ELEMENTS.split())


@dataclass(frozen=True)
class MoleculeProcessor:
    """Symbols in the order of their ids; behind them the encoder has one more, `[MASK]`.

    num_tokens: embeddings that the encoder makes of each molecule.
    """

    num_tokens: int
    symbols: tuple[str, ...] = _SYMBOLS

    def tokens(self, symbols: Sequence[str]) -> NDArray[np.int64]:
        """Ids of atoms between `[CLS]` and `[SEP]`; a symbol that is not in the dictionary is `[UNK]`."""
        ids = {symbol: i for i, symbol in enumerate(self.symbols)}
        unknown = ids["[UNK]"]
        inner = (ids.get(symbol, unknown) for symbol in symbols)
        return np.array([ids["[CLS]"], *inner, ids["[SEP]"]], np.int64)


def read_molecule_processor(folder: Path, num_tokens: int, vocab_size: int) -> MoleculeProcessor:
    """With the dictionary of `unimol/mol.dict.txt`, or the published one where there is no such file.

    vocab_size: symbols that the encoder knows.

    Raises:
        CheckpointError: the dictionary is not one, or not the encoder's.
    """
    path, symbols = folder / "unimol" / "mol.dict.txt", _SYMBOLS
    if path.exists():
        try:
            # A line may hold a count behind the symbol.
            symbols = tuple(line.split()[0] for line in path.read_text().splitlines() if line.strip())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: {error}") from error
    if not set(_SPECIAL) <= set(symbols) or len(set(symbols)) != len(symbols):
        raise CheckpointError(f"{path}: it lacks one of {', '.join(_SPECIAL)}, or names a symbol twice")
    if len(symbols) + 1 != vocab_size:
        raise CheckpointError(
            f"{path}: {len(symbols)} symbols and [MASK], the encoder of {folder} has {vocab_size}"
        )
    return MoleculeProcessor(num_tokens, symbols)
