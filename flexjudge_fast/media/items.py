"""A medium as the caller gave it, before anything is decoded, and how the caller wants it read."""

from dataclasses import dataclass
from typing import Literal, get_args

MediaKind = Literal["image", "video", "audio", "molecule"]
MEDIA_KINDS: tuple[str, ...] = get_args(MediaKind)


@dataclass(frozen=True)
class MediaItem:
    """`source` is a path, bytes, array or object, as the modality allows; it is read by its decoder only.

    `name` says where the caller gave it, such as "images[0]" or "responses[1].video": errors begin with it.
    """

    kind: MediaKind
    source: object
    name: str = ""


@dataclass(frozen=True)
class MediaOptions:
    """How one judgement's media are read; `None` leaves it to the checkpoint.

    Args:
        max_pixels: most pixels of an image or of a video's frame, after resizing.
        resize: (width, height) in pixels before they are rounded to whole patches.
        fps: frames per second taken from a video.
        allow_remote: fetch http(s) URLs.
        use_audio_in_video: hear a video's sound track, too; it must have one.
    """

    max_pixels: int | None = None
    resize: tuple[int, int] | None = None
    fps: float | None = None
    allow_remote: bool = False
    use_audio_in_video: bool = False
