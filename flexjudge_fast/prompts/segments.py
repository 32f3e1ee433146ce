"""The pieces of a prompt, each with its own right to produce control tokens."""

from dataclasses import dataclass

from flexjudge_fast.media.items import MediaItem


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
    """A medium; its placeholders are set by the model that reads it."""

    item: MediaItem


Segment = Scaffold | Text | Media
