"""The wording of prompts, loaded from a TOML file and checked when it is loaded."""

import hashlib
import re
import tomllib
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args

from flexjudge_fast.errors import PromptError
from flexjudge_fast.prompts.formats import AnswerFormat, Kind

_SYSTEM_NAMES = frozenset(
    {"rubric", "scale_low", "scale_high", "scale_kind", "num_responses", "answer_example"}
)
_KEYS = ("system", "question", "response")


@dataclass(frozen=True)
class FormatWording:
    """One format's system text and headings."""

    system: str
    question: str
    response: str


@dataclass(frozen=True)
class PromptTemplate:
    """Wording of all four formats. `digest` is the SHA-256 of the file, first 12 hex digits."""

    name: str
    digest: str
    default_rubric: str
    wordings: dict[str, FormatWording]

    @property
    def label(self) -> str:
        """What a verdict records."""
        return f"{self.name}@{self.digest}"

    def system(self, answer_format: AnswerFormat, rubric: str | None) -> str:
        """The system message. A rubric that holds `{...}` is not itself filled in."""
        scale = answer_format.scale
        values = {
            "rubric": rubric or self.default_rubric,
            "scale_low": f"{scale.low:g}",
            "scale_high": f"{scale.high:g}",
            "scale_kind": "a number with one decimal" if scale.decimals else "an integer",
            "num_responses": str(answer_format.num_responses),
            "answer_example": _example(answer_format),
        }
        return _fill(self.wordings[answer_format.kind].system, values)

    def heading(self, kind: Kind, number: int) -> str:
        """The heading of response `number`, counted from 1."""
        return _fill(self.wordings[kind].response, {"number": str(number)})


def load_template(path: str | Path | None = None) -> PromptTemplate:
    """Load a template file, or the built-in one.

    Raises:
        PromptError: the file is missing or malformed; the message names file and key.
    """
    source = "the built-in template" if path is None else str(path)
    try:
        raw = (
            Path(path).read_bytes()
            if path is not None
            else (files(__package__) / "default.toml").read_bytes()
        )
        data = tomllib.loads(raw.decode())
    except (OSError, ValueError) as error:
        raise PromptError(f"{source}: {error}") from error
    wordings = {kind: _wording(source, kind, data.get(kind)) for kind in get_args(Kind)}
    name, rubric = data.get("name"), data.get("default_rubric")
    if not isinstance(name, str) or not isinstance(rubric, str):
        raise PromptError(f"{source}: name and default_rubric must be strings")
    return PromptTemplate(name, hashlib.sha256(raw).hexdigest()[:12], rubric, wordings)


def _wording(source: str, kind: str, table: Any) -> FormatWording:
    if not isinstance(table, dict):
        raise PromptError(f"{source}: the table [{kind}] is missing")
    for key in _KEYS:
        if not isinstance(table.get(key), str):
            raise PromptError(f"{source}: {kind}.{key} is missing or not a string")
        known = _SYSTEM_NAMES if key == "system" else {"number"} if key == "response" else set()
        for name in re.findall(r"\{(\w+)\}", table[key]):
            if name not in known:
                raise PromptError(f"{source}: {kind}.{key} has an unknown placeholder {{{name}}}")
    return FormatWording(*(table[key] for key in _KEYS))


def _fill(text: str, values: dict[str, str]) -> str:
    return re.sub(r"\{(\w+)\}", lambda match: values[match[1]], text)


def _example(answer_format: AnswerFormat) -> str:
    """The shape of an answer, without a number: a small model repeats whatever example it is shown."""
    if answer_format.kind == "choice":
        return "<answer>[[verdict]]</answer>"
    if answer_format.num_responses == 1:
        return "<answer>score</answer>"
    return "".join(f"<answer>score {i + 1}</answer>" for i in range(answer_format.num_responses))
