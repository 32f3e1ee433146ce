"""Lays a judgement out as chat messages, in one order of its responses."""

from collections.abc import Mapping
from typing import Any

from flexjudge_fast.media.items import MediaItem
from flexjudge_fast.media.prepared import AnyMedia
from flexjudge_fast.prompts.judgement import MOLECULE_MARK, Judgement, Response
from flexjudge_fast.prompts.templates import PromptTemplate

Message = dict[str, Any]


def build_messages(
    judgement: Judgement,
    template: PromptTemplate,
    order: tuple[int, ...],
    read: Mapping[str, AnyMedia] | None = None,
) -> list[Message]:
    """System and user message. Place `i` shows response `order[i]`; media stand where they belong:
    the question's before its text, a candidate's under its heading. Molecules stand where the
    instruction says `<mol>`, if it does.

    read: media that were read before, by their items' names.
    """
    kind = judgement.kind
    system = judgement.system or template.system(judgement.format, judgement.rubric)
    question = _text(f"{template.wordings[kind].question}\n")
    marked, molecules = [_text(judgement.instruction)], []
    pieces = judgement.instruction.split(MOLECULE_MARK)
    if len(pieces) == len(judgement.molecules) + 1:
        molecules = [item for item in judgement.own_media if item.kind == "molecule"]
        marked = [_text(pieces[0])]
        for item, piece in zip(molecules, pieces[1:], strict=True):
            marked += [_media(item, read or {}), _text(piece)]
    parts = [_media(item, read or {}) for item in judgement.own_media if item not in molecules]
    parts += [question, *marked]
    for place, index in enumerate(order):
        response = judgement.responses[index]
        parts.append(_text(f"\n\n{template.heading(kind, place + 1)}\n"))
        parts.extend(_media(item, read or {}) for item in judgement.response_media(index))
        parts.append(_text((response.text or "") if isinstance(response, Response) else response))
    return [{"role": "system", "content": system}, {"role": "user", "content": parts}]


def _text(text: str) -> Message:
    return {"type": "text", "text": text}


def _media(item: MediaItem, read: Mapping[str, AnyMedia]) -> Message:
    return {"type": item.kind, item.kind: read.get(item.name, item.source)}
