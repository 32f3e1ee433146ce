"""Pairs to judge: made-up questions with a good and a poor answer, of the length that real ones have."""

import time
from collections.abc import Sequence
from typing import Any

RUBRIC = (
    "Accuracy comes first: a claim that is wrong weighs more than anything that is well put. Then look at "
    "completeness: does the answer cover every part of the question, with the numbers, units and conditions "
    "it depends on? Then clarity: is it in a sensible order, free of padding, and can a reader act on it "
    "without asking again? Give credit for naming the limits of an advice and for saying what is not known. "
    "Take points away for invented sources, for flattery, for repeating the question and for moralising. "
    "An answer that refuses without need scores at most 3; one that is dangerous to follow scores 1. "
    "Language mistakes count only where they hide the meaning."
)
_SUBJECTS = (
    ("store fresh bread", "a cloth bag at room temperature", "the refrigerator", "three days"),
    ("water a cactus", "a thorough soak once the soil is dry", "a little every morning", "two weeks"),
    ("learn a new alphabet", "short sessions with spaced repetition", "one long weekend", "five weeks"),
    ("dry wet walking boots", "paper inside them and moving air", "a hot radiator", "two days"),
    ("back up family photos", "three copies, one of them elsewhere", "one large disk", "one month"),
    ("sharpen a kitchen knife", "a whetstone at a steady low angle", "a grinding wheel", "six months"),
    ("descale a kettle", "citric acid in warm water", "a metal scraper", "eight weeks"),
    ("repot a small tree", "a pot two centimetres wider in spring", "the largest pot there is", "two years"),
)
_PLACES = ("in a small flat", "on a long journey", "for a school class", "in a damp climate")


def make_pairs(count: int) -> list[tuple[str, tuple[str, str]]]:
    """`count` questions with two answers each, all different (up to 32)."""
    out = []
    for i in range(count):
        task, good, poor, period = _SUBJECTS[i % len(_SUBJECTS)]
        place = _PLACES[i // len(_SUBJECTS) % len(_PLACES)]
        question = f"How do I {task} {place}, and how often should I think about it? Case {i + 1}."
        better = (
            f"Use {good}. It works {place} because nothing is forced: check after a day, and again after "
            f"{period}. If it does not help, change one thing at a time and write down what you changed."
        )
        worse = (
            f"The best way is {poor}, everybody knows that. Do it every day and do not worry about {place}."
        )
        out.append((question, (better, worse) if i % 2 else (worse, better)))
    return out


def seconds_to_judge(engine: Any, items: Sequence[Any]) -> float:
    """Until the last verdict is there.

    Args:
        engine: an `Engine`, or what stands for one.
        items: `Judgement`s.

    Raises:
        RuntimeError: a verdict has no answer.
    """
    from flexjudge_fast import Judge

    start = time.perf_counter()
    verdicts = list(Judge(engine).run(items))
    seconds = time.perf_counter() - start
    failed = [v.error for v in verdicts if v.finish_reason != "answer"]
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(verdicts)} verdicts have no answer: {failed[0]}")
    return seconds
