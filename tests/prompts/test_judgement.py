"""Judgements are checked when made, and laid out as messages."""

import math
from typing import Any

import pytest

from flexjudge_fast.errors import InvalidArgumentError
from flexjudge_fast.prompts.builder import build_messages
from flexjudge_fast.prompts.formats import AnswerFormat, Scale
from flexjudge_fast.prompts.judgement import Judgement, Response
from flexjudge_fast.prompts.templates import load_template

HUGE = 10**400


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("kind", "vote"),
        ("kind", None),
        ("instruction", ""),
        ("instruction", " \n"),
        ("instruction", None),
        ("instruction", "a\udc80"),
        ("responses", ()),
        ("responses", ("a",)),
        ("responses", ("a", "b", "c")),
        ("responses", "ab"),
        ("responses", ("a", "")),
        ("responses", ("a", "\ud800")),
        ("responses", ("a", None)),
        ("responses", ("a", Response())),
        ("responses", ("a", Response(text=" "))),
        ("responses", ("a", Response(text=3))),  # type: ignore[arg-type]
        ("system", 3),
        ("system", ""),
        ("rubric", "\ud800"),
        ("rubric", b"a"),
        ("scale", (10, 1)),
        ("scale", 10),
        ("scale", (1, 2, 3)),
        ("scale", (1, math.nan)),
        ("scale", (1, HUGE)),
        ("template", 3),
        ("votes", 0),
        ("votes", 1.0),
        ("votes", True),
        ("votes", 10**9),
        ("order", "reverse"),
        ("seed", -1),
        ("seed", 2**64),
        ("seed", None),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", HUGE),
        ("temperature", "0"),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("top_p", HUGE),
        ("max_tokens", 0),
        ("max_think_tokens", -1),
        ("guided", True),
        ("images", "cat.png"),
        ("id", ""),
        ("id", 7),
    ],
)
def test_a_wrong_field_is_named(field: str, value: Any) -> None:
    fields: dict[str, Any] = {"kind": "pair", "instruction": "q", "responses": ("a", "b"), field: value}
    with pytest.raises(InvalidArgumentError, match=field):
        Judgement(**fields)


def test_from_dict() -> None:
    data = {"instruction": "q", "responses": ["a", {"text": "b"}], "scale": [1, 5], "votes": 3, "id": "x"}
    judgement = Judgement.from_dict(data)
    assert judgement.kind == "pair"
    assert judgement.responses == ("a", Response(text="b"))
    assert judgement.scale == (1, 5)
    assert judgement.format == AnswerFormat("pair", 2, Scale(1, 5))
    assert Judgement.from_dict({"instruction": "q", "response": "a"}).kind == "score"
    assert data["responses"] == ["a", {"text": "b"}]  # left as it was


@pytest.mark.parametrize(
    ("data", "pattern"),
    [
        (3, "object"),
        ({}, "instruction"),
        ({"instruction": "q"}, "responses"),
        ({"instruction": "q", "responses": "a"}, "responses"),
        ({"instruction": "q", "responses": [{"txt": "a"}]}, r"responses\[0\].*txt"),
        ({"instruction": "q", "responses": [["a"]]}, r"responses\[0\]"),
        ({"instruction": "q", "response": "a", "responses": ["b"]}, "response"),
        ({"instruction": "q", "response": "a", "colour": 1}, "colour"),
    ],
)
def test_a_faulty_object_is_refused(data: Any, pattern: str) -> None:
    with pytest.raises(InvalidArgumentError, match=pattern):
        Judgement.from_dict(data)


def texts(judgement: Judgement, order: tuple[int, ...]) -> list[Any]:
    system, user = build_messages(judgement, load_template(), order)
    assert (system["role"], user["role"]) == ("system", "user")
    assert isinstance(user["content"], list)
    return user["content"]


def joined(parts: list[Any]) -> str:
    return "".join(part.get("text", f"({part['type']})") for part in parts)


def test_messages_in_both_orders() -> None:
    judgement = Judgement("pair", "Q?", ("one", Response(text="two")))
    assert joined(texts(judgement, (0, 1))) == (
        "[Question]\nQ?\n\n[Assistant 1's Answer]\none\n\n[Assistant 2's Answer]\ntwo"
    )
    assert joined(texts(judgement, (1, 0))) == (
        "[Question]\nQ?\n\n[Assistant 1's Answer]\ntwo\n\n[Assistant 2's Answer]\none"
    )


def test_system_text() -> None:
    plain = Judgement("score", "Q?", ("a",), rubric="Only brevity.")
    assert "Only brevity." in build_messages(plain, load_template(), (0,))[0]["content"]
    own = Judgement("score", "Q?", ("a",), system="Own {rubric}")
    assert build_messages(own, load_template(), (0,))[0]["content"] == "Own {rubric}"


def test_media_stand_where_they_belong() -> None:
    judgement = Judgement("pair", "Q?", ("a", Response(text="b", image="two.png")), images=("q.png",))
    assert [item.source for item in judgement.media] == ["q.png", "two.png"]
    assert joined(texts(judgement, (0, 1))) == (
        "(image)[Question]\nQ?\n\n[Assistant 1's Answer]\na\n\n[Assistant 2's Answer]\n(image)b"
    )
