"""A medium as the caller gave it, before anything is decoded."""

from dataclasses import dataclass
from typing import Literal, get_args

MediaKind = Literal["image", "video", "audio", "molecule"]
MEDIA_KINDS: tuple[str, ...] = get_args(MediaKind)


@dataclass(frozen=True)
class MediaItem:
    """`source` is a path, bytes, array or object, as the modality allows; it is read by its decoder only."""

    kind: MediaKind
    source: object
