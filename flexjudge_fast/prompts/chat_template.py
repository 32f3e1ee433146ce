"""Renders a checkpoint's chat template so that only the template itself can produce control tokens."""

import json
import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from flexjudge_fast.errors import PromptError
from flexjudge_fast.media.items import MEDIA_KINDS, MediaItem
from flexjudge_fast.prompts.segments import Media, Scaffold, Segment, Text

Content = list[Segment]
_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Surrounds and fills the second round of markers, to show what a template does to a content: whether it
# trims it, and whether it escapes or rewrites what is in it.
_PAD = " \n\t \n "
_BODY = "<a href=\"x\">'&amp;' \\n\n\n {{ x }} Ab"


class ChatTemplate:
    """A Jinja chat template, run in a sandbox with stand-ins for every content.

    The template sees a random marker instead of each content. What it writes around the markers is
    scaffold; the contents themselves never pass through it, so nothing in them is interpreted.

    Args:
        source: the template; `None` when the checkpoint has none; of several named ones "default" is used.
        tokenizer_config: names the tokens that a template may write, such as `bos_token`.

    Raises:
        PromptError: the template cannot be parsed.
    """

    def __init__(
        self, source: str | Sequence[Mapping[str, Any]] | None, tokenizer_config: Mapping[str, Any]
    ) -> None:
        # A token that the checkpoint lacks stays undefined, which writes nothing; None would write "None".
        tokens = {name: _token(tokenizer_config.get(name)) for name in _TOKEN_NAMES}
        self._names = {name: token for name, token in tokens.items() if token is not None}
        self._template = None
        if source is None:
            return
        env = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
        )
        env.filters["tojson"] = _tojson
        env.globals["raise_exception"] = _raise
        try:
            self._template = env.from_string(_one_source(source))
        except TemplateError as error:
            raise PromptError(f"chat template: {error}") from error

    def render(self, messages: Sequence[Any]) -> tuple[Segment, ...]:
        """Segments of a conversation, with the opening of the assistant's turn at the end.

        Args:
            messages: `{"role": ..., "content": ...}`; content is a string or a list of
                `{"type": "text", "text": ...}`, `{"type": "image", "image": ...}` and the like.

        Raises:
            PromptError: a message is malformed, or the template refuses, drops, repeats or alters a content.
        """
        contents = [read_message(i, message) for i, message in enumerate(messages)]
        roles = [message["role"] for message in messages]
        nonce = secrets.token_hex(8)
        markers = [f"\ue000aB{nonce}:{i}\ue001" for i in range(len(contents))]
        now = datetime.now()  # one moment for both rounds: a template may write the date
        scaffolds = _split(self._render(roles, markers, now), markers)
        padded = self._render(roles, [f"{_PAD}{m}{_BODY}{m}{_PAD}" for m in markers], now)
        trims = _trims(scaffolds, padded, markers)
        segments: list[Segment] = [Scaffold(scaffolds[0])]
        for content, scaffold, (left, right) in zip(contents, scaffolds[1:], trims, strict=True):
            segments += _trim(content, left, right)
            segments.append(Scaffold(scaffold))
        return tuple(segments)

    def _render(self, roles: Sequence[str], contents: Sequence[str], now: datetime) -> str:
        if self._template is None:
            raise PromptError("the checkpoint has no chat template; give a string or token ids instead")
        messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]
        context: dict[str, Any] = {**self._names, "messages": messages, "tools": None, "documents": None}
        context["strftime_now"] = now.strftime
        try:
            return self._template.render(context, add_generation_prompt=True)
        except Exception as error:  # a template is a program: it can raise anything
            raise PromptError(f"chat template: {error or type(error).__name__}") from error


class _GenerationBlock(Extension):
    """`{% generation %}` marks the assistant's turns in training templates; its inside is all that counts."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _split(rendered: str, markers: Sequence[str]) -> list[str]:
    """What stands between the markers: one piece more than there are markers."""
    pieces = []
    for marker in markers:
        before, found, rendered = rendered.partition(marker)
        if not found:
            raise PromptError("chat template: it drops, repeats, reorders or alters a message's content")
        pieces.append(before)
    if any(marker in piece for marker in markers for piece in (*pieces, rendered)):
        raise PromptError("chat template: it drops, repeats, reorders or alters a message's content")
    return [*pieces, rendered]


def _trims(scaffolds: Sequence[str], padded: str, markers: Sequence[str]) -> list[tuple[bool, bool]]:
    """For each content, whether the template cuts the white space on its left and on its right."""
    pieces = _split(padded, [marker for marker in markers for _ in range(2)]) if markers else [padded]
    if any(body != _BODY for body in pieces[1::2]):
        raise PromptError("chat template: it alters the messages' contents")
    cuts: list[bool] = []
    for i, (scaffold, piece) in enumerate(zip(scaffolds, pieces[0::2], strict=True)):
        before = (True, False) if i > 0 else (True,)  # there is no content before the first scaffold
        after = (True, False) if i < len(markers) else (True,)
        fits = [
            (a, b)
            for a in before
            for b in after
            if piece == ("" if a else _PAD) + scaffold + ("" if b else _PAD)
        ]
        if not fits:
            raise PromptError("chat template: it alters the messages' contents")
        cuts += fits[0]
    return list(zip(cuts[1:-1:2], cuts[2:-1:2], strict=True))


def _one_source(source: str | Sequence[Mapping[str, Any]]) -> str:
    if isinstance(source, str):
        return source
    named = {t.get("name"): t.get("template") for t in source if isinstance(t, Mapping)}
    default = named.get("default")
    if not isinstance(default, str):
        raise PromptError('chat template: neither a string nor a list with one named "default"')
    return default


def read_message(index: int, message: Any) -> Content:
    """A message's parts. PromptError: it is malformed."""
    if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
        raise PromptError(f"message {index}: it must be a dict with role and content")
    role, content = message["role"], message["content"]
    if not isinstance(role, str) or not re.fullmatch(r"[a-z_]+", role):
        raise PromptError(f"message {index}: role {role!r} is not a plain word")
    if isinstance(content, str):
        return [Text(content)]
    if not isinstance(content, Sequence):
        raise PromptError(f"message {index}: content must be a string or a list of parts")
    return [_read_part(index, part) for part in content]


def _read_part(index: int, part: Any) -> Segment:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return Text(part["text"])
    if kind in MEDIA_KINDS and kind in part:
        return Media(MediaItem(kind, part[kind]))
    kinds = ", ".join(("text", *MEDIA_KINDS))
    raise PromptError(f'message {index}: a part needs "type" (one of {kinds}) and a field of that name')


def _trim(content: Content, left: bool, right: bool) -> Content:
    """Cut the white space at the outer edges of a content, as the template would."""
    trimmed = list(content)
    if left:
        _strip_edge(trimmed, range(len(trimmed)), str.lstrip)
    if right:
        _strip_edge(trimmed, reversed(range(len(trimmed))), str.rstrip)
    return trimmed


def _strip_edge(content: Content, inwards: Iterable[int], strip: Callable[[str], str]) -> None:
    """Strip parts in place, going inwards, up to the first that keeps some text or is a medium."""
    for i in inwards:
        part = content[i]
        if not isinstance(part, Text):
            return
        content[i] = Text(strip(part.text))
        if strip(part.text):
            return


def _token(token: Any) -> str | None:
    value = token.get("content") if isinstance(token, Mapping) else token
    return value if isinstance(value, str) else None


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)
