"""Embeddings of the media in a batch: looked up, or encoded, distinct ones together."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch

from flexjudge_fast.engine.batch import Batch
from flexjudge_fast.engine.encoder_cache import EncoderCache
from flexjudge_fast.media.prepared import AnyMedia, PreparedAudio, PreparedMedia, PreparedMolecule
from flexjudge_fast.media.vision_processor import VisionProcessor
from flexjudge_fast.models.audio_tower import AudioTower
from flexjudge_fast.models.molecule_encoder import MoleculeEncoder
from flexjudge_fast.models.packed_audio import PackedAudioTower
from flexjudge_fast.models.packed_vision import PackedVisionTower
from flexjudge_fast.models.vision_tower import VisionTower
from flexjudge_fast.ops.image import patchify


@dataclass(frozen=True, eq=False)
class VisionEncoder:
    """Images and videos to embeddings. `num_threads`: of cutting patches."""

    tower: VisionTower | PackedVisionTower
    processor: VisionProcessor
    num_threads: int

    def encode(self, group: Sequence[PreparedMedia]) -> torch.Tensor:
        """[num_tokens of all, hidden]."""
        patches = torch.cat([self.patches(media) for media in group])
        return self.tower.encode(patches, [media.grid for media in group])

    def patches(self, media: PreparedMedia) -> torch.Tensor:
        p = self.processor
        table = torch.from_numpy(p.normalization_table())
        frames = torch.from_numpy(media.frames)
        return patchify(frames, table, p.patch_size, p.merge_size, p.temporal_patch_size, self.num_threads)


class EncoderRunner:
    """`run(batch)` gives what the model needs in place of placeholders.

    Args:
        vision, hearing, molecules: the encoders that the model has.
        max_patches: the most that are encoded at once, unless one medium alone has more: a bound on memory.
            Two frames of a spectrogram count as one, and so does an atom.
        dtype: of the language model, in which embeddings are kept.
    """

    def __init__(
        self,
        vision: VisionEncoder | None,
        hearing: AudioTower | PackedAudioTower | None,
        molecules: MoleculeEncoder | None,
        cache: EncoderCache,
        max_patches: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.vision = vision
        self.hearing = hearing
        self.molecules = molecules
        self.dtype = dtype
        self.cache = cache
        self.max_patches = max_patches
        self.device = device
        self.num_encoded = 0  # media
        self._last: dict[bytes, torch.Tensor] = {}  # of the batch before: a chunk may end inside a medium

    def run(self, batch: Batch) -> dict[bytes, torch.Tensor]:
        """By content key, [num_tokens, hidden] of each medium whose placeholders this batch computes."""
        found: dict[bytes, torch.Tensor] = {}
        missing: dict[bytes, AnyMedia] = {}
        for media in _needed(batch):
            if media.key in found or media.key in missing:
                continue
            cached = self._last.get(media.key)
            if cached is None:
                cached = self.cache.get(media.key)
            if cached is None:
                missing[media.key] = media
            else:
                found[media.key] = cached.to(self.device)
        for group in self._groups(missing):
            found |= self._encode(group)
        self._last = found
        return found

    def _groups(self, media: Mapping[bytes, AnyMedia]) -> Iterator[list[AnyMedia]]:
        """Media of one encoder each, in order."""
        group: list[AnyMedia] = []
        size = 0
        for item in sorted(media.values(), key=_encoder_of):
            if group and (
                size + _size(item) > self.max_patches or _encoder_of(item) != _encoder_of(group[0])
            ):
                yield group
                group, size = [], 0
            group.append(item)
            size += _size(item)
        if group:
            yield group

    def _encode(self, group: Sequence[AnyMedia]) -> dict[bytes, torch.Tensor]:
        seen = [media for media in group if isinstance(media, PreparedMedia)]
        heard = [torch.from_numpy(media.features) for media in group if isinstance(media, PreparedAudio)]
        graphs = [media.graph for media in group if isinstance(media, PreparedMolecule)]
        if seen:
            assert self.vision is not None
            embeddings = self.vision.encode(seen)
        elif heard:
            assert self.hearing is not None
            embeddings = self.hearing.encode(heard)
        else:
            assert self.molecules is not None
            embeddings = self.molecules.encode(graphs).to(self.dtype)
        parts = embeddings.split([media.num_tokens for media in group])
        for media, part in zip(group, parts, strict=True):
            self.cache.put(media.key, part)
        self.num_encoded += len(group)
        return {media.key: part for media, part in zip(group, parts, strict=True)}


def _encoder_of(media: AnyMedia) -> int:
    """Media with the same number are encoded together."""
    return (PreparedMedia, PreparedAudio, PreparedMolecule).index(type(media))


def _size(media: AnyMedia) -> int:
    """In patches."""
    if isinstance(media, PreparedMolecule):
        return len(media.graph.tokens) + len(media.graph.node_features)
    return media.features.shape[1] // 2 if isinstance(media, PreparedAudio) else prod(media.grid)


def _needed(batch: Batch) -> Iterable[AnyMedia]:
    for chunk in batch.chunks:
        for run in chunk.request.media:
            if run.start < chunk.end and run.end > chunk.start:
                yield run.media
