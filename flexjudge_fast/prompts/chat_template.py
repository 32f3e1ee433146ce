"""Renders a checkpoint's chat template so that only the template itself can produce control tokens."""

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from flexjudge_fast.errors import PromptError
from flexjudge_fast.media.items import MEDIA_KINDS, MediaItem
from flexjudge_fast.prompts.segments import Media, Scaffold, Segment, Text

Content = list[Segment]


class ChatTemplate:
    """A Jinja chat template, run in a sandbox with stand-ins for every content.

    The template sees a random marker instead of each content. What it writes around the markers is
    scaffold; the contents themselves never pass through it, so nothing in them is interpreted.
    """

    def __init__(self, source: str | None, tokenizer_config: Mapping[str, Any]) -> None:
        self._names = {name: _content(tokenizer_config.get(name)) for name in ("bos_token", "eos_token", "pad_token")}
        self._template = None
        if source is None:
            return
        env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        env.filters["tojson"] = _tojson
        env.globals["raise_exception"] = _raise
        env.globals["strftime_now"] = lambda fmt: datetime.now().strftime(fmt)
        try:
            self._template = env.from_string(source)
        except TemplateError as error:
            raise PromptError(f"chat template: {error}") from error

    def render(self, messages: Sequence[Any]) -> tuple[Segment, ...]:
        """Segments of a conversation, with the opening of the assistant's turn at the end.

        Args:
            messages: `{"role": ..., "content": ...}`; content is a string or a list of
                `{"type": "text", "text": ...}`, `{"type": "image", "image": ...}` and the like.

        Raises:
            PromptError: a message is malformed, or the template refuses, drops or repeats a content.
        """
        contents = [_read_message(i, message) for i, message in enumerate(messages)]
        roles = [message["role"] for message in messages]
        nonce = secrets.token_hex(8)
        markers = [f"\ue000{nonce}:{i}\ue001" for i in range(len(contents))]
        rendered = self._render(roles, markers)
        # A template may trim contents (Llama 3 does). Spaces around the markers show which it trims.
        padded = self._render(roles, [f" {marker} " for marker in markers])
        segments: list[Segment] = []
        found = re.split(f"\ue000{nonce}:(\\d+)\ue001", rendered)
        if [int(i) for i in found[1::2]] != list(range(len(contents))):
            raise PromptError("chat template: it drops, repeats or reorders the messages' contents")
        for i, scaffold in enumerate(found[0::2]):
            segments.append(Scaffold(scaffold))
            if i < len(contents):
                trimmed = f" {markers[i]} " not in padded
                segments.extend(_trim(contents[i]) if trimmed else contents[i])
        return tuple(segments)

    def _render(self, roles: Sequence[str], contents: Sequence[str]) -> str:
        if self._template is None:
            raise PromptError("the checkpoint has no chat template; give a string or token ids instead")
        messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]
        try:
            return self._template.render(messages=messages, add_generation_prompt=True, tools=None, **self._names)
        except (TemplateError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise PromptError(f"chat template: {error}") from error


def _read_message(index: int, message: Any) -> Content:
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


def _trim(content: Content) -> Content:
    """Strip the outer edges of a content, as the template would."""
    trimmed = list(content)
    if trimmed and isinstance(trimmed[0], Text):
        trimmed[0] = Text(trimmed[0].text.lstrip())
    if trimmed and isinstance(trimmed[-1], Text):
        trimmed[-1] = Text(trimmed[-1].text.rstrip())
    return trimmed


def _content(token: Any) -> str | None:
    value = token.get("content") if isinstance(token, Mapping) else token
    return value if isinstance(value, str) else None


def _tojson(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)
