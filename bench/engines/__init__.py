"""The engines compared, behind one small protocol, and what makes one missing."""

from typing import Protocol

MAX_BATCH, MAX_PROMPT = 16, 512


class Peer(Protocol):
    """One engine with one model loaded. Times are seconds on the wall."""

    name: str

    def prefill(self, num_tokens: int) -> float:
        """A prompt of `num_tokens` tokens, up to the logits of its last one; nothing of it is cached."""
        ...

    def decode(self, batch: int, num_tokens: int) -> float:
        """`num_tokens` greedy steps of `batch` sequences side by side, each after three tokens of prompt."""
        ...

    def close(self) -> None:
        """Give the memory back."""
        ...


class MissingError(Exception):
    """Something that cannot run here, and why."""


def prompt(num_tokens: int) -> list[int]:
    """The token ids that every engine prefills."""
    return list(range(10, 10 + num_tokens))


def short_prompts(batch: int) -> list[list[int]]:
    """The prompts after which every engine decodes."""
    return [[i + 1, 2, 3] for i in range(batch)]
