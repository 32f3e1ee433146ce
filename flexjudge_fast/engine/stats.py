"""Counters of an engine."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineStats:
    """KV blocks now, queues now, and tokens since the engine was made.

    `num_forward_tokens` went through the model; `num_cached_tokens` of the prompts' tokens did not have to.
    `num_encoded_media` media were encoded; `num_cached_media` times one was found done.
    """

    num_blocks: int
    num_used_blocks: int
    num_free_blocks: int
    num_cached_blocks: int
    num_running: int
    num_waiting: int
    num_preemptions: int
    num_forward_tokens: int
    num_prompt_tokens: int
    num_cached_tokens: int
    num_encoded_media: int = 0
    num_cached_media: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of prompt tokens that came from the prefix cache."""
        return self.num_cached_tokens / self.num_prompt_tokens if self.num_prompt_tokens else 0.0
