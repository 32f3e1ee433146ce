"""How media enter a multimodal model's prompt: placeholder ids and their M-RoPE positions."""

from dataclasses import dataclass

import numpy as np

from flexjudge_fast.media.prepared import AnyMedia, MediaRun, PreparedAudio, PreparedMedia, PreparedMolecule
from flexjudge_fast.models.audio_config import AudioConfig
from flexjudge_fast.models.mrope import PositionSpan, bracketed, grid_offsets, interleaved
from flexjudge_fast.models.vision_config import VisionConfig
from flexjudge_fast.prompts.segments import Placeholder


@dataclass(frozen=True)
class MediaInput:
    """The conventions of the model that these configurations describe; `audio` where it hears."""

    vision: VisionConfig
    audio: AudioConfig | None = None

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of media that the model reads."""
        return ("image", "video") if self.audio is None else ("image", "video", "audio")

    @property
    def pad_ids(self) -> frozenset[int]:
        heard = () if self.audio is None else (self.audio.audio_token_id,)
        return frozenset((self.vision.image_token_id, self.vision.video_token_id, *heard))

    def placeholder(self, media: AnyMedia) -> Placeholder:
        """Its ids, rows and positions."""
        if isinstance(media, PreparedAudio):
            return self._heard(media)
        assert not isinstance(media, PreparedMolecule)
        if media.sound is not None:
            return self._heard_and_seen(media, media.sound)
        vision = self.vision
        pad = vision.video_token_id if media.kind == "video" else vision.image_token_id
        ids = (vision.vision_start_token_id, *[pad] * media.num_tokens, vision.vision_end_token_id)
        return Placeholder(ids, (_whole(media),), PositionSpan(0, *bracketed(self._offsets(media))))

    def _heard(self, media: PreparedAudio) -> Placeholder:
        assert self.audio is not None
        audio, count = self.audio, media.num_tokens
        ids = (audio.audio_start_token_id, *[audio.audio_token_id] * count, audio.audio_end_token_id)
        inner = np.broadcast_to(np.arange(count), (3, count))
        return Placeholder(ids, (_whole(media),), PositionSpan(0, *bracketed(inner)))

    def _heard_and_seen(self, media: PreparedMedia, sound: PreparedAudio) -> Placeholder:
        assert self.audio is not None
        vision, audio = self.vision, self.audio
        chunk = int(vision.tokens_per_second * vision.seconds_per_chunk)
        pieces, offsets, advance = interleaved(self._offsets(media), sound.num_tokens, chunk)
        ids = [vision.vision_start_token_id, audio.audio_start_token_id]
        runs = []
        for name, first, last in pieces:
            source, pad = (media, vision.video_token_id) if name == "video" else (sound, audio.audio_token_id)
            runs.append(MediaRun(len(ids), source, first, last))
            ids += [pad] * (last - first)
        ids += [audio.audio_end_token_id, vision.vision_end_token_id]
        return Placeholder(tuple(ids), tuple(runs), PositionSpan(0, offsets, advance))

    def _offsets(self, media: PreparedMedia) -> "np.ndarray[tuple[int, ...], np.dtype[np.int64]]":
        time, height, width = media.grid
        grid = (time, height // self.vision.merge_size, width // self.vision.merge_size)
        seconds, speed = media.seconds_per_grid, self.vision.tokens_per_second
        # As in transformers: Qwen2.5-VL multiplies time by positions a step, Qwen2.5-Omni by seconds first.
        scales = (speed * seconds,) if self.audio is None else (seconds, speed)
        return grid_offsets(grid, *scales)


@dataclass(frozen=True)
class MoleculeInput:
    """Mol-LLaMA's convention: a token for each embedding, no brackets, positions that simply count on."""

    mol_token_id: int

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of media that the model reads."""
        return ("molecule",)

    @property
    def pad_ids(self) -> frozenset[int]:
        return frozenset((self.mol_token_id,))

    def placeholder(self, media: AnyMedia) -> Placeholder:
        """Its ids and rows."""
        return Placeholder(
            (self.mol_token_id,) * media.num_tokens, (MediaRun(0, media, 0, media.num_tokens),)
        )


def _whole(media: AnyMedia) -> MediaRun:
    """All of a medium's embeddings, behind one bracket."""
    return MediaRun(1, media, 0, media.num_tokens)
