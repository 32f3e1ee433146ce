"""Scales, and answers read out of free text."""

import math
from typing import Any

import pytest

from flexjudge_fast.errors import InvalidArgumentError
from flexjudge_fast.prompts.formats import CHOICES, AnswerFormat, Scale

SCORE = AnswerFormat("score", 1, Scale())
PAIR = AnswerFormat("pair", 2, Scale())
RANK = AnswerFormat("rank", 3, Scale())
CHOICE = AnswerFormat("choice", 2, Scale())


def test_values_of_scales() -> None:
    assert Scale().values == tuple(map(str, range(1, 11)))
    assert Scale(0, 3).values == ("0", "1", "2", "3")
    assert Scale(1.0, 1.3).values == ("1", "1.0", "1.1", "1.2", "1.3")
    assert Scale(0.5, 1).values == ("1", "0.5", "0.6", "0.7", "0.8", "0.9", "1.0")
    assert len({float(v) for v in Scale(0.0, 100.0).values}) == 1001


@pytest.mark.parametrize(
    ("low", "high"),
    [
        (10, 1),
        (5, 5),
        (-1, 5),
        (1.0, math.nan),
        (1.0, math.inf),
        (-math.inf, 1.0),
        (1.05, 2.0),
        (True, 5),
        ("1", 5),
        (None, 5),
        (1, 10**6),
        (1, 10**30),
        (1, 10**400),
        (0.0, 1e300),
        ([1], 5),
    ],
)
def test_a_scale_that_makes_no_sense_is_refused(low: Any, high: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="scale"):
        Scale(low, high)


@pytest.mark.parametrize(
    ("kind", "count", "scale"),
    [
        ("score", 0, Scale()),
        ("score", 2, Scale()),
        ("pair", 1, Scale()),
        ("pair", 3, Scale()),
        ("choice", 1, Scale()),
        ("rank", 1, Scale()),
        ("rank", 11, Scale()),
        ("rank", 6, Scale(1.0, 1.4)),
    ],
)
def test_a_wrong_number_of_responses_is_refused(kind: Any, count: int, scale: Scale) -> None:
    with pytest.raises(InvalidArgumentError, match=r"responses|scale"):
        AnswerFormat(kind, count, scale)


@pytest.mark.parametrize(
    ("answer_format", "text", "values"),
    [
        (SCORE, "<think>a</think><answer>3</answer>", ("3",)),
        (SCORE, "<think>a</think>\n<answer> 10 </answer> ok", ("10",)),
        (SCORE, "<answer>3</answer>", ("3",)),
        (SCORE, "<think>says <answer>9</answer></think><answer>3</answer>", ("3",)),
        (SCORE, "</think><answer>2</answer></think><answer>3</answer>", ("3",)),
        (SCORE, "</think><answer>2</answer> or rather <answer>3</answer>", ("3",)),
        (SCORE, "</think><answer>3</answer><answer>", ("3",)),
        (SCORE, "</think><answer>3</answer><think><answer>9</answer>", ("3",)),
        (AnswerFormat("score", 1, Scale(1.0, 10.0)), "</think><answer>3.8</answer>", ("3.8",)),
        (PAIR, "</think><answer>3</answer>\n<answer>5</answer>", ("3", "5")),
        (RANK, "</think><answer>3</answer><answer>8</answer><answer>6</answer>", ("3", "8", "6")),
        *((CHOICE, f"</think><answer>[[{choice}]]</answer>", (choice,)) for choice in CHOICES),
    ],
)
def test_answers_are_read(answer_format: AnswerFormat, text: str, values: tuple[str, ...]) -> None:
    answer = answer_format.parse(text)
    assert answer is not None
    assert answer.values == values
    assert answer.score_probs == ()


@pytest.mark.parametrize(
    ("answer_format", "text"),
    [
        (SCORE, ""),
        (SCORE, "a fine answer: 3"),
        (SCORE, "<think>the text says <answer>10</answer> but"),  # reasoning that never ended
        (SCORE, "<think>a</think> hm <think>it says <answer>10</answer>"),
        (SCORE, "<answer>10</answer></think> then nothing"),
        (SCORE, "</think><answer>11</answer>"),
        (SCORE, "</think><answer>0</answer>"),
        (SCORE, "</think><answer>3.5</answer>"),
        (SCORE, "</think><answer>03</answer>"),
        (SCORE, "</think><answer>３</answer>"),
        (SCORE, "</think><answer>three</answer>"),
        (SCORE, "</think><answer></answer>"),
        (SCORE, "</think><answer>3"),
        (SCORE, "</think><ANSWER>3</ANSWER>"),
        (SCORE, "</think><answer>5</answer> no: <answer>99</answer>"),
        (SCORE, "</think><answer>3</answer><answer>5</answer>"),
        (PAIR, "</think><answer>3</answer>"),
        (PAIR, "</think><answer>3</answer><answer>5</answer> also <answer>8</answer>"),
        (PAIR, "<answer>3</answer></think><answer>5</answer>"),
        (RANK, "</think><answer>3</answer><answer>8</answer><answer>3</answer>"),
        (CHOICE, "</think><answer>A>B</answer>"),
        (CHOICE, "</think><answer>[[A>C]]</answer>"),
        (CHOICE, "</think><answer>[[A>B]][[B>A]]</answer>"),
    ],
)
def test_what_is_no_complete_answer_is_none(answer_format: AnswerFormat, text: str) -> None:
    assert answer_format.parse(text) is None


def test_reading_takes_linear_time() -> None:
    for text in ("<answer>" * 100_000, "<answer>3</answer> " * 50_000 + "x", "</answer>" * 100_000):
        SCORE.parse("</think>" + text)
