"""The pieces of a prompt, each with its own right to produce control tokens."""

from dataclasses import dataclass

from flexjudge_fast.media.items import MediaItem
from flexjudge_fast.media.prepared import MediaRun, PreparedMedia


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


@dataclass(frozen=True)
class Placeholder:
    """A medium that was read, as the model expects it: `pad` for each embedding, between two brackets."""

    before: int
    pad: int
    after: int
    media: PreparedMedia

    @property
    def token_ids(self) -> list[int]:
        return [self.before, *[self.pad] * self.media.num_tokens, self.after]


Segment = Scaffold | Text | Media | Placeholder


@dataclass(frozen=True)
class Prompt:
    """Token ids, and where media stand among them, in order."""

    token_ids: tuple[int, ...]
    media: tuple[MediaRun, ...] = ()

    def __len__(self) -> int:
        return len(self.token_ids)
