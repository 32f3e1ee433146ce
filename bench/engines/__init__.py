"""The engines compared: each has `prefill(num_tokens)` and `decode(batch, num_tokens)`, in seconds."""

from typing import Protocol


class Peer(Protocol):
    name: str

    def prefill(self, num_tokens: int) -> float:
        """Seconds for a prompt of `num_tokens` tokens, up to the logits of its last one."""
        ...

    def decode(self, batch: int, num_tokens: int) -> float:
        """Seconds for `num_tokens` greedy steps of `batch` sequences after a prompt of three tokens each."""
        ...


class MissingError(Exception):
    """An engine that cannot run here, and why."""
