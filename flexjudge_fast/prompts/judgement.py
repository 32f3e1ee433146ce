"""What is to be judged, and how: checked when it is made."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, cast, get_args

from flexjudge_fast.errors import InvalidArgumentError
from flexjudge_fast.media.items import MEDIA_KINDS, MediaItem, MediaKind, MediaOptions
from flexjudge_fast.prompts.formats import AnswerFormat, Kind, Scale

Order = Literal["fixed", "both", "random"]
Guided = Literal["on", "off"]
MOLECULE_MARK = "<mol>"  # of an instruction: a molecule stands here


@dataclass(frozen=True)
class Response:
    """A candidate: a text, a medium, or both."""

    text: str | None = None
    image: object = None
    video: object = None
    audio: object = None
    molecule: object = None

    def media(self, name: str) -> tuple[MediaItem, ...]:
        """Its media; `name` is what the caller calls this response."""
        given = [(kind, getattr(self, kind)) for kind in MEDIA_KINDS]
        return tuple(
            MediaItem(cast(MediaKind, kind), source, f"{name}.{kind}")
            for kind, source in given
            if source is not None
        )


@dataclass(frozen=True)
class Judgement:
    """One question to the judge.

    Args:
        kind: score (one response), pair (two), rank (two or more), choice (two).
        instruction: what was asked; `responses`: what was answered, strings or `Response`.
        system: replaces the template's system message.
        rubric: the criteria, inside the template's system message.
        scale: lowest and highest score; ints for whole numbers, a float for one decimal.
        template: path of a template file, for this judgement alone.
        votes: sampled runs; order: "fixed", "both" (twice, the second time reversed) or "random".
        seed, temperature, top_p: sampling. max_tokens: of reasoning and answer together.
        max_think_tokens: closes the reasoning after so many tokens; 0 answers at once.
        guided: "on" forces a legal answer; "off" leaves the model free.
        images, videos, audios, molecules: media that belong to the question; they stand before it, molecules
            where the instruction says `<mol>`, if it does so once for each.
        max_pixels: most pixels of an image or of a video's frame; resize: (width, height) of every image and
            frame, to whole patches; fps: frames per second taken of a video. The checkpoint's own if `None`.
        allow_remote: fetch images and recordings from http(s) URLs.
        use_audio_in_video: the judge hears the videos' sound tracks, too; each must have one.
        id: a name that the verdict carries.

    Raises:
        InvalidArgumentError: names the field that is wrong.
    """

    kind: Kind
    instruction: str
    responses: Sequence[str | Response]
    system: str | None = None
    rubric: str | None = None
    scale: tuple[float, float] = (1, 10)
    template: str | Path | None = None
    votes: int = 1
    order: Order = "fixed"
    seed: int = 0
    temperature: float = 0.4
    top_p: float = 0.8
    max_tokens: int = 4096
    max_think_tokens: int | None = None
    guided: Guided = "on"
    images: tuple[object, ...] = ()
    videos: tuple[object, ...] = ()
    audios: tuple[object, ...] = ()
    molecules: tuple[object, ...] = ()
    max_pixels: int | None = None
    resize: tuple[int, int] | None = None
    fps: float | None = None
    allow_remote: bool = False
    use_audio_in_video: bool = False
    id: str | None = None

    def __post_init__(self) -> None:
        _one_of("kind", self.kind, get_args(Kind))
        _one_of("order", self.order, get_args(Order))
        _one_of("guided", self.guided, get_args(Guided))
        for name in ("responses", "images", "videos", "audios", "molecules"):
            value = getattr(self, name)
            if isinstance(value, str | bytes) or not isinstance(value, list | tuple):
                raise InvalidArgumentError(f"{name}: a list is expected, not {type(value).__name__}")
            object.__setattr__(self, name, tuple(value))
        _text("instruction", self.instruction)
        if not isinstance(self.template, str | Path | None):
            raise InvalidArgumentError(f"template: a path is expected, not {type(self.template).__name__}")
        for name in ("system", "rubric", "id"):
            if getattr(self, name) is not None:
                _text(name, getattr(self, name))
        for i, response in enumerate(self.responses):
            _response(f"responses[{i}]", response)
        if not isinstance(self.scale, list | tuple) or len(self.scale) != 2:
            raise InvalidArgumentError(f"scale={self.scale!r}: a pair (low, high) is expected")
        object.__setattr__(self, "scale", tuple(self.scale))
        _integer("votes", self.votes, 1, 1024)
        _integer("seed", self.seed, 0, 2**64 - 1)
        _integer("max_tokens", self.max_tokens, 1, 2**31)
        if self.max_think_tokens is not None:
            _integer("max_think_tokens", self.max_think_tokens, 0, 2**31)
        _number("temperature", self.temperature, 0, 1e6)
        _number("top_p", self.top_p, 1e-9, 1)
        if self.max_pixels is not None:
            _integer("max_pixels", self.max_pixels, 1, 2**31)
        if self.fps is not None:
            _number("fps", self.fps, 1e-3, 1e3)
        if self.resize is not None:
            if not isinstance(self.resize, list | tuple) or len(self.resize) != 2:
                raise InvalidArgumentError(f"resize={self.resize!r}: a pair (width, height) is expected")
            for side in self.resize:
                _integer("resize", side, 1, 2**16)
            object.__setattr__(self, "resize", tuple(self.resize))
        for name in ("allow_remote", "use_audio_in_video"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidArgumentError(f"{name}={getattr(self, name)!r}: True or False is expected")
        _marks(self.instruction, len(self.molecules))
        _ = self.format  # checks scale and number of responses

    @property
    def format(self) -> AnswerFormat:
        return AnswerFormat(self.kind, len(self.responses), Scale(*self.scale))

    @property
    def own_media(self) -> tuple[MediaItem, ...]:
        """The media that belong to the question."""
        return tuple(
            MediaItem(kind, source, f"{kind}s[{i}]")
            for kind in cast("tuple[MediaKind, ...]", MEDIA_KINDS)
            for i, source in enumerate(getattr(self, kind + "s"))
        )

    def response_media(self, index: int) -> tuple[MediaItem, ...]:
        """The media of one response."""
        response = self.responses[index]
        return response.media(f"responses[{index}]") if isinstance(response, Response) else ()

    @property
    def media(self) -> tuple[MediaItem, ...]:
        """Every medium: the question's own, then the responses' in order."""
        given = (item for i in range(len(self.responses)) for item in self.response_media(i))
        return (*self.own_media, *given)

    @property
    def media_options(self) -> MediaOptions:
        return MediaOptions(
            self.max_pixels, self.resize, self.fps, self.allow_remote, self.use_audio_in_video
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Judgement":
        """From a JSON object: `response` may stand for a single entry of `responses`."""
        if not isinstance(data, Mapping):
            raise InvalidArgumentError(f"a judgement must be an object, not {type(data).__name__}")
        given = dict(data)
        if "response" in given and "responses" in given:
            raise InvalidArgumentError("response: give it or responses, not both")
        if "response" in given:
            given["responses"] = [given.pop("response")]
        known = {field.name for field in fields(cls)}
        for name in given:
            if name not in known:
                raise InvalidArgumentError(f"unknown field {name!r}; known are: {', '.join(sorted(known))}")
        for name in ("instruction", "responses"):
            if name not in given:
                raise InvalidArgumentError(f"{name} is missing")
        if not isinstance(given["responses"], list | tuple):
            raise InvalidArgumentError("responses: a list is expected")
        given["responses"] = [_read_response(f"responses[{i}]", r) for i, r in enumerate(given["responses"])]
        given.setdefault("kind", "score" if len(given["responses"]) == 1 else "pair")
        return cls(**given)


def _read_response(name: str, value: Any) -> Any:
    """A JSON object to a `Response`; anything else as it is."""
    if not isinstance(value, Mapping):
        return value
    known = [field.name for field in fields(Response)]
    for key in value:
        if key not in known:
            raise InvalidArgumentError(f"{name}: unknown field {key!r}; known are: {', '.join(known)}")
    return Response(**value)


def _text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise InvalidArgumentError(f"{name}: a string is expected, not {type(value).__name__}")
    if not value.strip():
        raise InvalidArgumentError(f"{name}: it is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidArgumentError(f"{name}: {error.reason} at character {error.start}") from error


def _marks(instruction: str, num_molecules: int) -> None:
    found = instruction.count(MOLECULE_MARK)
    if num_molecules and found not in (0, num_molecules):
        raise InvalidArgumentError(
            f"instruction: {found} {MOLECULE_MARK} for {num_molecules} molecules; write one for each, or "
            "none and they stand before the instruction"
        )


def _response(name: str, value: object) -> None:
    if isinstance(value, Response):
        if value.text is None and not value.media(name):
            raise InvalidArgumentError(f"{name}: it has neither text nor medium")
        if value.text is not None:
            _text(name, value.text)
        return
    _text(name, value)


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InvalidArgumentError(f"{name}={value!r}: must be one of {', '.join(allowed)}")


def _integer(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidArgumentError(f"{name}={value!r}: must be an integer from {low} to {high}")


def _number(name: str, value: object, low: float, high: float) -> None:
    ok = isinstance(value, int | float) and not isinstance(value, bool)
    if not ok or not low <= cast(float, value) <= high:
        raise InvalidArgumentError(f"{name}={value!r}: must be a number from {low:g} to {high:g}")
