"""What comes out of the engine for one sample of one prompt."""

from dataclasses import dataclass

from flexjudge_fast.engine.request import Request, Timings
from flexjudge_fast.prompts.formats import Answer


@dataclass(frozen=True)
class Completion:
    """One generated sample.

    `logprobs[i]` maps token ids to log-probabilities at generated token `i` (only when asked for).
    `num_cached_tokens` are prompt tokens that did not have to be computed for this sample. `answer` and
    `reasoning` are set for requests with an answer grammar. `finish_reason`: stop, length, answer, error.
    """

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    finish_reason: str
    num_cached_tokens: int
    sample_index: int
    timings: Timings
    logprobs: tuple[dict[int, float], ...] | None = None
    answer: Answer | None = None
    reasoning: str | None = None
    error: Exception | None = None


def complete(request: Request) -> Completion:
    """The completion of a finished request."""
    grammar = request.grammar
    return Completion(
        prompt_token_ids=request.prompt,
        token_ids=tuple(request.token_ids[len(request.prompt) :]),
        text=request.output.decode("utf-8", errors="replace"),
        finish_reason=request.finish_reason or "error",
        num_cached_tokens=min(request.num_cached or 0, len(request.prompt)),
        sample_index=request.sample_index,
        timings=request.timings,
        logprobs=tuple(request.logprobs) if request.params.logprobs is not None else None,
        answer=None if grammar is None or request.error else grammar.result(),
        reasoning=None if grammar is None else grammar.think_text(),
        error=request.error,
    )
