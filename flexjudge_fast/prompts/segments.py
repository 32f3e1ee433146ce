"""The pieces of a prompt, each with its own right to produce control tokens."""

from dataclasses import dataclass

from flexjudge_fast.media.items import MediaItem
from flexjudge_fast.media.prepared import MediaRun
from flexjudge_fast.models.mrope import PositionSpan


@dataclass(frozen=True)
class Scaffold:
    """Text of the checkpoint's chat template: the only text that may hold control tokens."""

    text: str


@dataclass(frozen=True)
class Text:
    """Any other text, ours or the user's: it never yields a control token."""

    text: str


@dataclass(frozen=True)
class Media:
    """A medium that is still to be read."""

    item: MediaItem


@dataclass(frozen=True, eq=False)
class Placeholder:
    """A medium that was read, as the ids the model expects: placeholders between brackets.

    Args:
        token_ids: of all of it.
        runs: which of them stand for embeddings, counted from its first token.
        span: their positions, in the same way; `None` where they simply count on.
    """

    token_ids: tuple[int, ...]
    runs: tuple[MediaRun, ...]
    span: PositionSpan | None = None


@dataclass(frozen=True)
class Seam:
    """Where a model's training has encoded the texts on both sides apart."""


Segment = Scaffold | Text | Media | Placeholder | Seam


@dataclass(frozen=True)
class Prompt:
    """Token ids, and where media stand among them, in order, with their positions."""

    token_ids: tuple[int, ...]
    media: tuple[MediaRun, ...] = ()
    spans: tuple[PositionSpan, ...] = ()

    @property
    def media_bytes(self) -> int:
        """What its media hold until they are encoded, each counted once."""
        return sum(media.nbytes for media in {run.media.key: run.media for run in self.media}.values())

    def __len__(self) -> int:
        return len(self.token_ids)
