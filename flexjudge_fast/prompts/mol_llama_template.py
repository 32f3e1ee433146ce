"""Chat messages as Mol-LLaMA's training (Kim et al. 2025) wrote them.

Its tokenizer may bring the template of the Llama it was made from, which adds a date and more; the training
has not used that. Each message is encoded by itself, and the begin of text belongs to the system message.
"""

from collections.abc import Collection, Sequence
from typing import Any

from flexjudge_fast.errors import PromptError
from flexjudge_fast.prompts.chat_template import read_message
from flexjudge_fast.prompts.segments import Scaffold, Seam, Segment

_HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"
_END = "<|eot_id|>"


class MolLlamaTemplate:
    """`render(messages)` as in `ChatTemplate`, in Llama 3's format; in Llama 2's without Llama 3's tokens."""

    def __init__(self, control_tokens: Collection[str]) -> None:
        self._is_llama3 = "<|start_header_id|>" in control_tokens

    def render(self, messages: Sequence[Any]) -> tuple[Segment, ...]:
        """Segments of a conversation that ends with the user.

        Raises:
            PromptError: a message is malformed or out of turn.
        """
        segments: list[Segment] = []
        before = ""
        for i, message in enumerate(messages):
            content = read_message(i, message)
            role = message["role"]
            if role not in ("system", "user", "assistant"):
                raise PromptError(f"message {i}: role {role!r} is not system, user or assistant")
            if role == "assistant" and before != "user":
                raise PromptError(f"message {i}: an assistant's message follows a user's")
            opening, closing = self._llama3(role) if self._is_llama3 else self._llama2(role, i, before)
            segments += [Seam(), Scaffold(opening), *content, Scaffold(closing)]
            before = role
        if before != "user":
            raise PromptError("the last message must be the user's")
        return tuple(segments)

    def _llama3(self, role: str) -> tuple[str, str]:
        if role == "system":
            return "<|begin_of_text|>" + _HEADER.format("system"), _END
        if role == "user":
            return _HEADER.format("user"), _END + _HEADER.format("assistant")
        return "", _END

    def _llama2(self, role: str, index: int, before: str) -> tuple[str, str]:
        if role == "system":
            return "<s>[INST] <<SYS>>\n", "\n<</SYS>>\n\n"
        if role == "assistant":
            return "", "</s>"
        if index == 1 and before == "system":
            return "", "[/INST]\n\n"
        return "\n<s>[INST] ", " [/INST]\n\n"
