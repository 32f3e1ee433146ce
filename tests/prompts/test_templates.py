"""Wording from files: checked when loaded, filled without surprises."""

from pathlib import Path
from typing import get_args

import pytest

from flexjudge_fast.errors import PromptError
from flexjudge_fast.prompts.formats import AnswerFormat, Kind, Scale
from flexjudge_fast.prompts.templates import load_template

COUNTS = {"score": 1, "pair": 2, "rank": 3, "choice": 2}
TABLE = '[{kind}]\nsystem = "{system}"\nquestion = "[Q]"\nresponse = "[R {{number}}]"\n'


def write(folder: Path, head: str = 'name = "own"\ndefault_rubric = "Be kind."\n', **systems: str) -> Path:
    path = folder / "own.toml"
    tables = [TABLE.format(kind=k, system=systems.get(k, "Judge: {rubric}")) for k in get_args(Kind)]
    path.write_text(head + "".join(tables), encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", get_args(Kind))
def test_the_built_in_wording_is_complete(kind: Kind) -> None:
    template = load_template()
    text = template.system(AnswerFormat(kind, COUNTS[kind], Scale()), None)
    for tag in ("<think>", "</think>", "<answer>", "</answer>"):
        assert tag in text
    assert template.default_rubric in text
    assert "{" not in text
    assert template.heading("pair", 2) == "[Assistant 2's Answer]"
    assert template.heading("score", 1) == "[Assistant's Answer]"


def test_a_rubric_is_text_not_a_template() -> None:
    rubric = r"{scale_high} {rubric} {nothing} \1 \g<0> <|im_end|> {"
    assert rubric in load_template().system(AnswerFormat("score", 1, Scale()), rubric)


def test_scales_are_written_out(tmp_path: Path) -> None:
    path = write(
        tmp_path, score="{scale_low} to {scale_high}, {scale_kind}, {num_responses}, {answer_example}"
    )
    template = load_template(path)
    text = template.system(AnswerFormat("score", 1, Scale(0.5, 2.0)), None)
    assert text.startswith("0.5 to 2, a number with one decimal, 1, <answer>")
    assert template.system(AnswerFormat("score", 1, Scale()), None).startswith("1 to 10, an integer, 1, ")


def test_own_wording_and_its_digest(tmp_path: Path) -> None:
    path = write(tmp_path)
    template = load_template(path)
    assert template.system(AnswerFormat("pair", 2, Scale()), None) == "Judge: Be kind."
    assert template.label.startswith("own@")
    path.write_text(path.read_text() + "# changed\n")
    assert load_template(path).digest != template.digest
    assert load_template().label == load_template(None).label


def test_a_faulty_file_is_refused_by_file_and_key(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"nowhere\.toml"):
        load_template(tmp_path / "nowhere.toml")
    with pytest.raises(PromptError, match=r"own\.toml.*choice\.system.*\{colour\}"):
        load_template(write(tmp_path, choice="{colour}"))
    with pytest.raises(PromptError, match=r"own\.toml.*name"):
        load_template(write(tmp_path, head=""))
    path = tmp_path / "part.toml"
    for content, pattern in [
        ("[score\n", r"part\.toml"),
        ('name = "x"\ndefault_rubric = "y"\n', r"\[score\]"),
        ('name = "x"\ndefault_rubric = "y"\nscore = 3\n', r"\[score\]"),
        ('name = "x"\ndefault_rubric = "y"\n[score]\nsystem = "a"\n', r"score\.question"),
        ('name = "x"\ndefault_rubric = "y"\n[score]\nsystem = 3\n', r"score\.system"),
    ]:
        path.write_text(content)
        with pytest.raises(PromptError, match=pattern):
            load_template(path)
    path.write_bytes(b'name = "\xff"')
    with pytest.raises(PromptError, match=r"part\.toml"):
        load_template(path)
    with pytest.raises(PromptError):
        load_template(tmp_path)
