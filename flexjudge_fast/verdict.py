"""What a judgement comes to: scores, winner, reasoning, and how they were reached."""

import html
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Winner = int | Literal["tie"] | None


@dataclass(frozen=True)
class Usage:
    """Tokens. `prompt`: of the prompts (one per order); `cached`: of those, not computed again;
    `generated`: over all votes."""

    prompt: int = 0
    cached: int = 0
    generated: int = 0


@dataclass(frozen=True)
class VerdictTimings:
    """Seconds from the judgement's arrival in the engine, and the speed of what followed."""

    first_token: float = 0.0
    total: float = 0.0
    tokens_per_second: float = 0.0


@dataclass(frozen=True)
class Provenance:
    """What is needed to get the same verdict again.

    `arithmetic`: instruction set, activations before quantised products, and the KV cache's dtype.
    """

    model: str = ""
    weights_hash: str = ""
    template: str = ""
    seed: int = 0
    dtype: str = ""
    arithmetic: str = ""
    engine_version: str = ""


@dataclass(frozen=True)
class Vote:
    """One sampled run. Everything is in the caller's order of responses, whatever order the model saw.

    `order[i]` is the response that stood at place `i`. `score_probs[r]` maps each score that can be written
    for response `r` to its probability; for a choice there is one entry, over the four choices.
    """

    order: tuple[int, ...]
    reasoning: str
    finish_reason: str
    scores: tuple[float, ...] | None = None
    expected_scores: tuple[float, ...] | None = None
    score_probs: tuple[dict[str, float], ...] | None = None
    choice: str | None = None
    winner: Winner = None


@dataclass(frozen=True)
class Verdict:
    """The outcome of one judgement.

    `scores` and `expected_scores` are means over the votes that answered; an expected score is the mean of
    the score's distribution at the answer. `winner` is the index of the better response, `"tie"`, or `None`
    when there is nothing to win or no vote answered. `ranking` lists responses best first. `confidence` is
    the mean probability that the votes give to this outcome. `finish_reason` is `answer`, `no_answer`, or
    `error` (then `error` says what went wrong).
    """

    kind: str
    finish_reason: str
    scores: tuple[float, ...] | None = None
    expected_scores: tuple[float, ...] | None = None
    score_probs: tuple[dict[str, float], ...] | None = None
    winner: Winner = None
    choice: str | None = None
    ranking: tuple[int, ...] | None = None
    confidence: float | None = None
    reasoning: str = ""
    votes: tuple[Vote, ...] = ()
    order_consistent: bool | None = None
    usage: Usage = field(default_factory=Usage)
    timings: VerdictTimings = field(default_factory=VerdictTimings)
    provenance: Provenance = field(default_factory=Provenance)
    error: str | None = None
    id: str | None = None
    index: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, numbers and strings; `from_dict` gives an equal verdict back."""
        plain = _plain(asdict(self))
        assert isinstance(plain, dict)
        return plain

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Verdict":
        """The inverse of `to_dict`."""
        fields = dict(data)
        votes = tuple(Vote(**_tuples(vote)) for vote in fields.pop("votes", ()))
        usage = Usage(**fields.pop("usage", {}))
        timings = VerdictTimings(**fields.pop("timings", {}))
        provenance = Provenance(**fields.pop("provenance", {}))
        return cls(**_tuples(fields), votes=votes, usage=usage, timings=timings, provenance=provenance)

    @property
    def headline(self) -> str:
        """The verdict in a few words."""
        if self.finish_reason != "answer":
            return self.error or "no answer"
        if self.kind == "score" and self.scores is not None and self.expected_scores is not None:
            return f"score {self.scores[0]:g} (expected {self.expected_scores[0]:.2f})"
        if self.kind == "rank" and self.ranking is not None:
            return "ranking " + " > ".join(str(i + 1) for i in self.ranking)
        if self.winner == "tie":
            return f"tie ({self.choice})" if self.choice else "tie"
        return "no winner" if self.winner is None else f"response {self.winner + 1} is better"

    def __repr__(self) -> str:
        parts = [self.headline]
        if self.scores is not None and self.kind != "score":
            parts.append("scores " + ", ".join(f"{s:g}" for s in self.scores))
        if self.confidence is not None:
            parts.append(f"confidence {self.confidence:.2f}")
        if len(self.votes) > 1:
            parts.append(f"{len(self.votes)} votes")
        if self.order_consistent is not None:
            parts.append("orders agree" if self.order_consistent else "orders disagree")
        return f"<Verdict {self.kind}: {'; '.join(parts)}>"

    def _repr_html_(self) -> str:
        rows = {"verdict": self.headline}
        if self.scores is not None:
            rows["scores"] = ", ".join(f"{s:g}" for s in self.scores)
        if self.expected_scores is not None:
            rows["expected"] = ", ".join(f"{s:.2f}" for s in self.expected_scores)
        if self.confidence is not None:
            rows["confidence"] = f"{self.confidence:.2f}"
        rows["reasoning"] = self.reasoning
        cells = "".join(f"<tr><th>{k}</th><td>{html.escape(v)}</td></tr>" for k, v in rows.items())
        return f"<table>{cells}</table>"


@dataclass(frozen=True)
class BestOf:
    """The best of several responses, each scored by itself.

    `best` is the first of `tied`, all responses whose expected score is the highest; `None` if none has a
    score. `scores` are the expected scores, `None` where a response has none; `verdicts` say why.
    """

    best: int | None
    tied: tuple[int, ...]
    scores: tuple[float | None, ...]
    verdicts: tuple[Verdict, ...]

    @property
    def is_tie(self) -> bool:
        return len(self.tied) > 1

    @property
    def headline(self) -> str:
        """The outcome in a few words."""
        if self.best is None:
            return "no response has a score"
        names = ", ".join(str(i + 1) for i in self.tied)
        what = f"responses {names} tie" if self.is_tie else f"response {names} is the best"
        return f"{what} (expected {self.scores[self.best]:.2f})"

    def __repr__(self) -> str:
        scores = ", ".join("none" if score is None else f"{score:.2f}" for score in self.scores)
        return f"<BestOf: {self.headline}; scores {scores}>"

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, numbers and strings."""
        plain = _plain(asdict(self))
        assert isinstance(plain, dict)
        return plain


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
