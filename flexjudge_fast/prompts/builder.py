"""Lays a judgement out as chat messages, in one order of its responses."""

from typing import Any

from flexjudge_fast.media.items import MediaItem
from flexjudge_fast.prompts.judgement import Judgement, Response
from flexjudge_fast.prompts.templates import PromptTemplate

Message = dict[str, Any]


def build_messages(judgement: Judgement, template: PromptTemplate, order: tuple[int, ...]) -> list[Message]:
    """System and user message. Place `i` shows response `order[i]`; media stand where they belong:
    the question's before its text, a candidate's under its heading."""
    kind = judgement.kind
    system = judgement.system or template.system(judgement.format, judgement.rubric)
    parts: list[Message] = [_media(item) for item in judgement.media[: _num_own(judgement)]]
    parts.append(_text(f"{template.wordings[kind].question}\n{judgement.instruction}"))
    for place, index in enumerate(order):
        response = judgement.responses[index]
        parts.append(_text(f"\n\n{template.heading(kind, place + 1)}\n"))
        if isinstance(response, Response):
            parts.extend(_media(item) for item in response.media)
            parts.append(_text(response.text or ""))
        else:
            parts.append(_text(response))
    return [{"role": "system", "content": system}, {"role": "user", "content": parts}]


def _num_own(judgement: Judgement) -> int:
    return sum(len(getattr(judgement, name)) for name in ("images", "videos", "audios", "molecules"))


def _text(text: str) -> Message:
    return {"type": "text", "text": text}


def _media(item: MediaItem) -> Message:
    return {"type": item.kind, item.kind: item.source}
