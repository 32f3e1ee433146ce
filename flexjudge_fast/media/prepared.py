"""A medium ready for its encoder: pixels, features or a graph; and the key of its embeddings."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flexjudge_fast.media.items import MediaKind
from flexjudge_fast.models.molecule_graph import MoleculeGraph


@dataclass(frozen=True, eq=False)
class PreparedMedia:
    """An image or video after decoding, sampling and resizing.

    Args:
        kind: "image" or "video".
        key: 32 bytes; equal keys mean equal decoded pixels, times and settings (`media/keys.py`).
        frames: uint8 [num_frames, height, width, 3], RGB, height and width whole numbers of merged patches.
        grid: patches over time, height and width.
        num_tokens: embeddings that the encoder makes of it.
        seconds_per_grid: seconds from one temporal patch to the next; 0 for an image.
        sound: of a video that is heard, too.
    """

    kind: MediaKind
    key: bytes
    frames: NDArray[np.uint8]
    grid: tuple[int, int, int]
    num_tokens: int
    seconds_per_grid: float = 0.0
    sound: "PreparedAudio | None" = None

    @property
    def nbytes(self) -> int:
        return self.frames.nbytes


@dataclass(frozen=True, eq=False)
class PreparedAudio:
    """A sound after decoding, mixing, resampling and its spectrogram.

    Features are kept and not samples: they are smaller (128 values for 160 samples), and no step needs both.

    Args:
        kind: "audio", also of a video's sound track.
        key: 32 bytes; equal keys mean equal decoded samples, rates and settings (`media/keys.py`).
        features: float32 [feature_size, num_frames], log-mel.
        num_tokens: embeddings that the encoder makes of it.
        seconds: how long it lasts, before short ones are filled up with silence.
    """

    kind: MediaKind
    key: bytes
    features: NDArray[np.float32]
    num_tokens: int
    seconds: float

    @property
    def nbytes(self) -> int:
        return self.features.nbytes


@dataclass(frozen=True, eq=False)
class PreparedMolecule:
    """A molecule after parsing, with a place for each atom.

    Args:
        kind: "molecule".
        key: 32 bytes; equal keys mean equal graphs, places and dictionaries (`media/keys.py`).
        graph: what the encoders read.
        num_tokens: embeddings that the encoder makes of it.
    """

    kind: MediaKind
    key: bytes
    graph: MoleculeGraph
    num_tokens: int

    @property
    def nbytes(self) -> int:
        graph = self.graph
        arrays = (graph.tokens, graph.coordinates, graph.node_features, graph.edge_index, graph.edge_features)
        return sum(array.nbytes for array in arrays)


AnyMedia = PreparedMedia | PreparedAudio | PreparedMolecule


@dataclass(frozen=True, eq=False)
class MediaRun:
    """Placeholders of a medium, side by side in a prompt.

    They stand for the embeddings [first_row, last_row) of `media`, from position `start` on.
    """

    start: int
    media: AnyMedia
    first_row: int
    last_row: int

    @property
    def end(self) -> int:
        return self.start + self.last_row - self.first_row
