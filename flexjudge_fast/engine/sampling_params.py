"""How tokens are drawn and when a generation stops."""

import math
from dataclasses import dataclass

from flexjudge_fast.errors import InvalidArgumentError


@dataclass(frozen=True)
class SamplingParams:
    """Sampling settings of one prompt.

    Args:
        temperature: divides the logits; 0 is greedy.
        top_p: keep the likeliest tokens whose probabilities first reach this sum.
        top_k: keep the `top_k` likeliest tokens; 0 keeps all.
        min_p: keep tokens at least this fraction as likely as the likeliest.
        seed: the same seed, prompt and sample give the same draws, whatever else runs.
        n: samples per prompt; the prompt is computed once.
        max_tokens: the most tokens to generate per sample.
        stop: strings that end the generation; they are not part of the text.
        stop_token_ids: further ids that end the generation.
        ignore_eos: go on past the end-of-sequence token.
        logprobs: for each generated token, report the log-probabilities of this many likeliest tokens.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    n: int = 1
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        for name in ("temperature", "top_p", "min_p"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise InvalidArgumentError(f"{name}={value!r} is not a finite number")
        for name in ("top_k", "seed", "n", "max_tokens"):
            if isinstance(getattr(self, name), bool) or not isinstance(getattr(self, name), int):
                raise InvalidArgumentError(f"{name}={getattr(self, name)!r} is not an integer")
        checks = {
            "temperature": (self.temperature >= 0, "at least 0"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "between 0 and 1"),
            "top_k": (self.top_k >= 0, "at least 0"),
            "seed": (0 <= self.seed < 2**64, "between 0 and 2**64 - 1"),
            "n": (self.n >= 1, "at least 1"),
            "max_tokens": (self.max_tokens >= 1, "at least 1"),
            "stop": (all(isinstance(s, str) and s for s in self.stop), "strings that are not empty"),
            "logprobs": (self.logprobs is None or 0 <= self.logprobs <= 100, "between 0 and 100"),
        }
        for name, (ok, wanted) in checks.items():
            if not ok:
                raise InvalidArgumentError(f"{name}={getattr(self, name)!r}: must be {wanted}")
