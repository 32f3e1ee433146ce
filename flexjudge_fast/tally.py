"""From the engine's completions to votes, and from votes to a verdict."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeVar

from flexjudge_fast.engine.completion import Completion
from flexjudge_fast.prompts.formats import Answer, AnswerFormat
from flexjudge_fast.prompts.judgement import Judgement
from flexjudge_fast.verdict import BestOf, Provenance, Usage, Verdict, VerdictTimings, Vote, Winner

T = TypeVar("T")
TIES = ("A=B=Good", "A=B=Bad")


def read_vote(
    completion: Completion, answer_format: AnswerFormat, order: tuple[int, ...], guided: bool
) -> Vote:
    """One sample's vote, turned back into the caller's order of responses."""
    if guided:
        answer, reasoning = completion.answer, completion.reasoning or ""
    else:
        answer, reasoning = answer_format.parse(completion.text), completion.text
    if answer is None:
        return Vote(order=order, reasoning=reasoning.strip(), finish_reason="no_answer")
    if answer_format.kind == "choice":
        return _choice_vote(answer, order, reasoning.strip())
    scores = _restore([float(v) for v in answer.values], order)
    # Without the grammar there is no distribution at hand: the score itself is all that is known.
    probs = answer.score_probs or tuple({value: 1.0} for value in answer.values)
    score_probs = _restore(probs, order)
    expected = tuple(expectation(p) for p in score_probs)
    winner = _best(scores) if answer_format.kind in ("pair", "rank") else None
    return Vote(order, reasoning.strip(), "answer", scores, expected, score_probs, None, winner)


def _choice_vote(answer: Answer, order: tuple[int, ...], reasoning: str) -> Vote:
    swapped = order != tuple(range(len(order)))
    choice = _swap(answer.values[0]) if swapped else answer.values[0]
    probs = answer.score_probs[0] if answer.score_probs else {answer.values[0]: 1.0}
    if swapped:
        probs = {_swap(name): p for name, p in probs.items()}
    return Vote(order, reasoning, "answer", score_probs=(probs,), choice=choice, winner=_chosen(choice))


def _chosen(choice: str) -> Winner:
    """The winner that a choice names."""
    return "tie" if choice in TIES else 0 if choice == "A>B" else 1


def _swap(choice: str) -> str:
    return {"A>B": "B>A", "B>A": "A>B"}.get(choice, choice)


def _restore(items: Sequence[T], order: tuple[int, ...]) -> tuple[T, ...]:
    """Items by place, as the model saw them, to items by response."""
    return tuple(items[order.index(response)] for response in range(len(order)))


def expectation(probs: dict[str, float]) -> float:
    """Mean of a distribution over written scores."""
    return sum(float(value) * p for value, p in probs.items())


def _best(scores: Sequence[float]) -> Winner:
    top = [i for i, score in enumerate(scores) if score == max(scores)]
    return top[0] if len(top) == 1 else "tie"


def tally(
    judgement: Judgement,
    votes: Sequence[Vote],
    usage: Usage,
    timings: VerdictTimings,
    provenance: Provenance,
    index: int,
) -> Verdict:
    """Count the votes.

    The majority of the votes that answered wins. A draw between winners goes to the higher mean expected
    score (for a choice: the higher mean probability), and is a tie when these are equal too.
    """
    answered = [vote for vote in votes if vote.finish_reason == "answer"]
    common = {
        "kind": judgement.kind,
        "votes": tuple(votes),
        "usage": usage,
        "timings": timings,
        "provenance": provenance,
        "id": judgement.id,
        "index": index,
    }
    if not answered:
        reasoning = votes[0].reasoning if votes else ""
        return Verdict(finish_reason="no_answer", reasoning=reasoning, **common)  # type: ignore[arg-type]
    scores = _mean_scores([vote.scores for vote in answered])
    expected = _mean_scores([vote.expected_scores for vote in answered])
    probs = _mean_probs(answered)
    choice = _majority_choice(answered, probs[0]) if judgement.kind == "choice" else None
    winner = _majority(answered, expected, choice) if judgement.kind != "score" else None
    ranking = None
    if expected is not None and judgement.kind in ("pair", "rank"):
        ranking = tuple(
            sorted(range(len(expected)), key=lambda i: (-(scores or expected)[i], -expected[i], i))
        )
    agreeing = [v for v in answered if (v.choice == choice if choice else v.winner == winner)] or answered
    return Verdict(
        finish_reason="answer",
        scores=scores,
        expected_scores=expected,
        score_probs=probs,
        winner=winner,
        choice=choice,
        ranking=ranking,
        confidence=_confidence(judgement.kind, probs, scores, winner, choice),
        reasoning=agreeing[0].reasoning,
        order_consistent=_order_consistent(answered) if judgement.order == "both" else None,
        **common,  # type: ignore[arg-type]
    )


def best_of(verdicts: Sequence[Verdict]) -> BestOf:
    """The best of responses that were scored one by one, by expected score; equal ones tie."""
    scores = tuple(v.expected_scores[0] if v.expected_scores else None for v in verdicts)
    known = [score for score in scores if score is not None]
    tied = tuple(i for i, score in enumerate(scores) if known and score == max(known))
    return BestOf(tied[0] if tied else None, tied, scores, tuple(verdicts))


def _mean_scores(rows: Sequence[tuple[float, ...] | None]) -> tuple[float, ...] | None:
    known = [row for row in rows if row is not None]
    return tuple(sum(column) / len(known) for column in zip(*known, strict=True)) if known else None


def _mean_probs(votes: Sequence[Vote]) -> tuple[dict[str, float], ...]:
    """The votes' distributions averaged, response by response."""
    columns = zip(*(vote.score_probs or () for vote in votes), strict=True)
    means = []
    for column in columns:
        total: dict[str, float] = {}
        for probs in column:
            for value, p in probs.items():
                total[value] = total.get(value, 0.0) + p / len(votes)
        means.append(total)
    return tuple(means)


def _majority(votes: Sequence[Vote], expected: tuple[float, ...] | None, choice: str | None) -> Winner:
    if choice is not None:
        return _chosen(choice)
    counts = Counter(vote.winner for vote in votes)
    top = [winner for winner, count in counts.items() if count == max(counts.values())]
    if len(top) == 1 or expected is None:
        return top[0] if len(top) == 1 else "tie"
    return _best(expected)


def _majority_choice(votes: Sequence[Vote], probs: dict[str, float]) -> str:
    """The choice most votes made; a draw goes to the likelier one, then to a tie."""
    counts = Counter(vote.choice for vote in votes if vote.choice is not None)
    top = [choice for choice, count in counts.items() if count == max(counts.values())]
    return max(top, key=lambda choice: (probs.get(choice, 0.0), choice in TIES, choice))


def _order_consistent(votes: Sequence[Vote]) -> bool | None:
    """Whether both orders lead to the same winner; `None` when one of them gave no answer."""
    by_order: dict[tuple[int, ...], list[Vote]] = {}
    for vote in votes:
        by_order.setdefault(vote.order, []).append(vote)
    if len(by_order) < 2:
        return None
    winners = set()
    for group in by_order.values():
        expected = _mean_scores([vote.expected_scores for vote in group])
        probs = _mean_probs(group)
        choice = _majority_choice(group, probs[0]) if group[0].choice is not None else None
        winners.add(choice or _majority(group, expected, None))
    return len(winners) == 1


def _confidence(
    kind: str,
    probs: tuple[dict[str, float], ...],
    scores: tuple[float, ...] | None,
    winner: Winner,
    choice: str | None,
) -> float | None:
    """Probability of the outcome under the mean distributions, the responses' scores taken as independent."""
    if kind == "choice":
        return probs[0].get(choice or "", 0.0)
    if kind == "score":
        return max(p for value, p in probs[0].items() if float(value) == _nearest(probs[0], scores))
    if winner == "tie":
        top = sorted(range(len(probs)), key=lambda i: -expectation(probs[i]))[:2]
        return _compare(probs[top[0]], probs[top[1]], lambda a, b: a == b)
    if isinstance(winner, int):
        others = [probs[i] for i in range(len(probs)) if i != winner]
        return min(_compare(probs[winner], other, lambda a, b: a > b) for other in others)
    return None


def _nearest(probs: dict[str, float], scores: tuple[float, ...] | None) -> float:
    target = scores[0] if scores else expectation(probs)
    return min((float(value) for value in probs), key=lambda value: abs(value - target))


def _compare(a: dict[str, float], b: dict[str, float], wins: Callable[[float, float], bool]) -> float:
    return sum(p * q for x, p in a.items() for y, q in b.items() if wins(float(x), float(y)))
