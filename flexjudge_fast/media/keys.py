"""Keys of media: 32 bytes that two media share only if their embeddings are the same."""

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
from numpy.typing import NDArray

from flexjudge_fast.media.audio_processor import AudioProcessor
from flexjudge_fast.media.items import MediaKind
from flexjudge_fast.media.molecule_processor import MoleculeProcessor
from flexjudge_fast.media.vision_processor import VisionProcessor
from flexjudge_fast.models.molecule_graph import MoleculeGraph

KEY_BYTES = 32


class _Fields:
    """A hash over named fields. Name and value are written with their lengths, so that no two lists of fields
    give the same bytes, however they are cut."""

    def __init__(self, domain: str):
        self._hash = hashlib.sha256()  # with the processor's own instructions, twice as fast as BLAKE2b
        self.put("domain", domain.encode())

    def put(self, name: str, value: bytes | memoryview) -> None:
        self._hash.update(struct.pack("<I", len(name)) + name.encode())
        self._hash.update(struct.pack("<Q", memoryview(value).nbytes))
        self._hash.update(value)

    def integers(self, name: str, values: Sequence[int]) -> None:
        self.put(name, struct.pack(f"<{len(values)}q", *values))

    def numbers(self, name: str, values: Sequence[float]) -> None:
        self.put(name, struct.pack(f"<{len(values)}d", *values))

    def digest(self) -> bytes:
        return self._hash.digest()


class PixelDigest:
    """The digest of decoded frames, taken one at a time: dtype, shape and bytes of each, and their number."""

    def __init__(self) -> None:
        self._fields = _Fields("flexjudge pixels 1")
        self._count = 0

    def update(self, frame: NDArray[np.generic]) -> None:
        """`frame`: any dtype and shape. Its strides do not matter."""
        self._fields.put("dtype", frame.dtype.str.encode())
        self._fields.integers("shape", frame.shape)
        self._fields.put("pixels", np.ascontiguousarray(frame).data.cast("B") if frame.size else b"")
        self._count += 1

    def digest(self) -> bytes:
        """32 bytes; more frames may follow."""
        fields = _Fields("flexjudge frames 1")
        fields.integers("count", [self._count])
        fields.put("frames", self._fields.digest())
        return fields.digest()


def pixel_digest(frames: Sequence[NDArray[np.generic]]) -> bytes:
    """`PixelDigest` of frames that are all there."""
    digest = PixelDigest()
    for frame in frames:
        digest.update(frame)
    return digest.digest()


def media_key(
    kind: MediaKind,
    *,
    mode: str,
    size: tuple[int, int],
    pixels: bytes,
    target: tuple[int, int],
    processor: VisionProcessor,
    salt: bytes,
    frame_indices: Sequence[int] = (),
    times: Sequence[float] = (),
    fps: float = 0.0,
) -> bytes:
    """The key of a medium under the settings that shape its embeddings: 32 bytes.

    Args:
        mode: how the source stored its pixels, such as Pillow's "RGBA" or a video's pixel format.
        size: height and width after decoding.
        pixels: `PixelDigest` of what was decoded.
        target: height and width after resizing.
        processor: its patch sizes, mean, std and rescale_factor; the limits show in `target`.
        salt: what else the embeddings depend on: the model, its dtype.
        frame_indices, times, fps: of a video's frames, times in seconds.
    """
    fields = _Fields("flexjudge media 1")
    fields.put("kind", kind.encode())
    fields.put("salt", salt)
    fields.put("mode", mode.encode())
    fields.put("pixels", pixels)
    fields.integers("size", size)
    fields.integers("target", target)
    fields.integers("frame_indices", frame_indices)
    fields.numbers("times", times)
    fields.numbers("fps", [fps])
    patches = (processor.patch_size, processor.temporal_patch_size, processor.merge_size)
    fields.integers("patches", patches)
    fields.numbers("mean", processor.mean)
    fields.numbers("std", processor.std)
    fields.numbers("rescale_factor", [processor.rescale_factor])
    return fields.digest()


class SampleDigest:
    """The digest of decoded sound, however it is cut into blocks: channels, number and bytes of samples."""

    def __init__(self, channels: int) -> None:
        self._hash = hashlib.sha256()
        self._channels, self._count = channels, 0

    def update(self, block: NDArray[np.float32]) -> None:
        """`block`: float32 [num_samples, channels]. Its strides do not matter."""
        self._hash.update(np.ascontiguousarray(block, dtype="<f4").tobytes())
        self._count += block.size

    def digest(self) -> bytes:
        """32 bytes; more blocks may follow."""
        fields = _Fields("flexjudge samples 1")
        fields.integers("counts", [self._channels, self._count])
        fields.put("samples", self._hash.digest())
        return fields.digest()


def audio_key(*, samples: bytes, rate: int, processor: AudioProcessor, salt: bytes) -> bytes:
    """The key of a sound under the settings that shape its embeddings: 32 bytes.

    How the source stored its samples is no part of it: equal samples have equal embeddings.

    Args:
        samples: `SampleDigest` of what was decoded, before mixing and resampling.
        rate: samples per second of the source.
        processor: all its fields.
        salt: what else the embeddings depend on: the model, its dtype.
    """
    fields = _Fields("flexjudge audio 2")
    fields.put("salt", salt)
    fields.put("samples", samples)
    fields.integers("rate", [rate])
    for name, value in asdict(processor).items():
        fields.integers(name, [value])
    return fields.digest()


def molecule_key(graph: MoleculeGraph, processor: MoleculeProcessor) -> bytes:
    """The key of a molecule under the settings that shape its embeddings: 32 bytes.

    It covers what the encoders read, to the bit and in order: a molecule written in another order of its
    atoms has other places, and other last bits.
    """
    fields = _Fields("flexjudge molecule 1")
    for name, array in vars(graph).items():
        fields.integers(name + " shape", array.shape)
        little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        fields.put(name, little.tobytes())
    fields.put("symbols", " ".join(processor.symbols).encode())
    fields.integers("num_tokens", [processor.num_tokens])
    return fields.digest()
