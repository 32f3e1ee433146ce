"""Embeddings of the media in a batch: looked up, or encoded, distinct ones together."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod

import torch

from flexjudge_fast.engine.batch import Batch
from flexjudge_fast.engine.encoder_cache import EncoderCache
from flexjudge_fast.media.prepared import PreparedMedia
from flexjudge_fast.media.vision_processor import VisionProcessor
from flexjudge_fast.models.packed_vision import PackedVisionTower
from flexjudge_fast.models.vision_tower import VisionTower
from flexjudge_fast.ops.image import patchify


class EncoderRunner:
    """`run(batch)` gives what the model needs in place of placeholders.

    Args:
        max_patches: the most that are encoded at once, unless one medium alone has more: a bound on memory.
    """

    def __init__(
        self,
        tower: VisionTower | PackedVisionTower,
        processor: VisionProcessor,
        cache: EncoderCache,
        max_patches: int,
        device: torch.device,
        num_threads: int,
    ) -> None:
        self.tower = tower
        self.processor = processor
        self.cache = cache
        self.max_patches = max_patches
        self.device = device
        self.num_threads = num_threads  # of cutting patches
        self.num_encoded = 0  # media
        self._last: dict[bytes, torch.Tensor] = {}  # of the batch before: a chunk may end inside a medium

    def run(self, batch: Batch) -> dict[bytes, torch.Tensor]:
        """By content key, [num_tokens, hidden] of each medium whose placeholders this batch computes."""
        found: dict[bytes, torch.Tensor] = {}
        missing: dict[bytes, PreparedMedia] = {}
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

    def _groups(self, media: Mapping[bytes, PreparedMedia]) -> Iterator[list[PreparedMedia]]:
        group: list[PreparedMedia] = []
        size = 0
        for item in media.values():
            if group and size + prod(item.grid) > self.max_patches:
                yield group
                group, size = [], 0
            group.append(item)
            size += prod(item.grid)
        if group:
            yield group

    def _encode(self, group: Sequence[PreparedMedia]) -> dict[bytes, torch.Tensor]:
        patches = torch.cat([self._patches(media) for media in group])
        embeddings = self.tower.encode(patches, [media.grid for media in group])
        parts = embeddings.split([media.num_tokens for media in group])
        for media, part in zip(group, parts, strict=True):
            self.cache.put(media.key, part)
        self.num_encoded += len(group)
        return {media.key: part for media, part in zip(group, parts, strict=True)}

    def _patches(self, media: PreparedMedia) -> torch.Tensor:
        p = self.processor
        table = torch.from_numpy(p.normalization_table())
        frames = torch.from_numpy(media.frames)
        return patchify(frames, table, p.patch_size, p.merge_size, p.temporal_patch_size, self.num_threads)


def _needed(batch: Batch) -> Iterable[PreparedMedia]:
    for chunk in batch.chunks:
        for run in chunk.request.media:
            if run.start < chunk.end and run.end > chunk.start:
                yield run.media
