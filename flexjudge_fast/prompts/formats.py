"""The four answer formats: which answers are legal, how they are written, how they are read."""

import re
from dataclasses import dataclass
from typing import Literal

from flexjudge_fast.errors import InvalidArgumentError

Kind = Literal["score", "pair", "rank", "choice"]
CHOICES = ("A>B", "B>A", "A=B=Good", "A=B=Bad")
THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
_MAX_VALUES = 1001
_LIMIT = 1_000_000


@dataclass(frozen=True)
class Scale:
    """Scores from `low` to `high`: whole numbers if both ends are ints, else tenths."""

    low: float = 1
    high: float = 10

    def __post_init__(self) -> None:
        for name in ("low", "high"):
            value = getattr(self, name)
            if (
                isinstance(value, bool)
                or not isinstance(value, int | float)
                or not -_LIMIT <= value <= _LIMIT
            ):
                raise InvalidArgumentError(f"scale: {name}={value!r} is not a number within {_LIMIT:,}")
            if abs(value * 10 - round(value * 10)) > 1e-9:
                raise InvalidArgumentError(f"scale: {name}={value!r} has more than one decimal")
        if self.low >= self.high:
            raise InvalidArgumentError(f"scale: low={self.low!r} is not below high={self.high!r}")
        if self.low < 0:
            raise InvalidArgumentError(f"scale: low={self.low!r} is negative")
        if len(self._tenths) > _MAX_VALUES:
            raise InvalidArgumentError(
                f"scale: {len(self._tenths)} values, at most {_MAX_VALUES} are allowed"
            )

    @property
    def decimals(self) -> bool:
        return isinstance(self.low, float) or isinstance(self.high, float)

    @property
    def _tenths(self) -> range:
        step = 1 if self.decimals else 10
        return range(round(self.low * 10), round(self.high * 10) + 1, step)

    @property
    def values(self) -> tuple[str, ...]:
        """Every score as it may be written; with decimals a whole number has two spellings, 3 and 3.0."""
        whole = [str(t // 10) for t in self._tenths if t % 10 == 0]
        if not self.decimals:
            return tuple(whole)
        return tuple(whole + [f"{t // 10}.{t % 10}" for t in self._tenths])


@dataclass(frozen=True)
class Answer:
    """What was answered, as written, one value per slot; and how likely each legal value was."""

    values: tuple[str, ...]
    score_probs: tuple[dict[str, float], ...] = ()


@dataclass(frozen=True)
class Slot:
    """A part of the answer: one of `values`, in a rank not one that an earlier slot took."""

    values: tuple[str, ...]
    distinct: bool = False


@dataclass(frozen=True)
class AnswerFormat:
    """A format with its scale: what may stand behind `</think>`."""

    kind: Kind
    num_responses: int
    scale: Scale

    def __post_init__(self) -> None:
        needed = {"score": (1, 1), "pair": (2, 2), "choice": (2, 2), "rank": (2, 1000)}[self.kind]
        if not needed[0] <= self.num_responses <= needed[1]:
            wanted = needed[0] if needed[0] == needed[1] else f"at least {needed[0]}"
            raise InvalidArgumentError(f"responses: {self.kind} takes {wanted}, {self.num_responses} given")
        distinct = len({float(v) for v in self.scale.values})
        if self.kind == "rank" and distinct < self.num_responses:
            raise InvalidArgumentError(
                f"scale: {distinct} different scores cannot rank {self.num_responses} responses; "
                "widen the scale"
            )

    def parts(self) -> tuple[str | Slot, ...]:
        """The answer as literal text and slots in turn, literals first and last."""
        if self.kind == "choice":
            return ("<answer>[[", Slot(CHOICES), "]]</answer>")
        slot = Slot(self.scale.values, distinct=self.kind == "rank")
        parts: list[str | Slot] = ["<answer>", slot]
        for _ in range(self.num_responses - 1):
            parts += ["</answer><answer>", slot]
        return (*parts, "</answer>")

    def parse(self, text: str) -> Answer | None:
        """Read freely generated text: the last complete answer after the last `</think>`, or `None`.

        The values of one answer stand side by side, with nothing but white space between them. Reasoning
        that was begun and never closed holds no answer, whatever it quotes.
        """
        tail = text.rpartition(THINK_CLOSE)[2].partition(THINK_OPEN)[0]
        runs = re.findall(r"(?:<answer>[^<]*</answer>\s*)+", tail)
        values = tuple(value.strip() for value in re.findall(r"<answer>([^<]*)</answer>", (runs or [""])[-1]))
        count = 1 if self.kind == "choice" else self.num_responses
        if len(values) != count:
            return None
        if self.kind == "choice":
            match = re.fullmatch(r"\[\[(.+)\]\]", values[0])
            return Answer((match[1],)) if match and match[1] in CHOICES else None
        if any(value not in self.scale.values for value in values):
            return None
        if self.kind == "rank" and len({float(v) for v in values}) < count:
            return None
        return Answer(values)
