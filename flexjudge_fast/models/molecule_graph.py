"""A molecule as the encoders read it: plain arrays, made in `media/`."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class MoleculeGraph:
    """The same molecule twice: m atoms in space for Uni-Mol, n atoms and b bonds for MoleculeSTM."""

    tokens: NDArray[np.int64]  # [m + 2]: Uni-Mol's ids, between CLS and SEP
    coordinates: NDArray[np.float64]  # [m + 2, 3]: centred; CLS and SEP at the origin
    node_features: NDArray[np.int64]  # [n, 9]
    edge_index: NDArray[np.int64]  # [2, 2 * b]: sources, then targets; both directions of each bond
    edge_features: NDArray[np.int64]  # [2 * b, 3]

    @property
    def num_pairs(self) -> int:
        """Pairs of tokens in space: what the memory of encoding grows with."""
        return len(self.tokens) ** 2
