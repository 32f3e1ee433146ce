"""Turns what a caller gives the engine into token ids, with media read and placed among them."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flexjudge_fast.engine.media_input import MediaInput, MoleculeInput
from flexjudge_fast.errors import InvalidArgumentError, UnsupportedMediaError
from flexjudge_fast.media.items import MediaItem, MediaOptions
from flexjudge_fast.media.prepared import AnyMedia
from flexjudge_fast.media.reader import MediaReader, TokenBudget, result_of
from flexjudge_fast.models.mrope import mrope_positions
from flexjudge_fast.prompts.chat_template import ChatTemplate
from flexjudge_fast.prompts.mol_llama_template import MolLlamaTemplate
from flexjudge_fast.prompts.segments import Media, Prompt, Segment
from flexjudge_fast.prompts.tokenizer import Tokenizer

Message = Mapping[str, Any]
PromptLike = str | Sequence[int] | Sequence[Message] | Prompt


class PromptEncoder:
    """Knows the model's tokenizer, chat template and, where it reads media, how it wants them.

    Args:
        vocab_size: of the model; the tokenizer's may be smaller or larger.
        max_len: tokens that a sequence may have.
        media, reader: both or neither.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        chat_template: ChatTemplate | MolLlamaTemplate,
        vocab_size: int,
        max_len: int,
        media: MediaInput | MoleculeInput | None = None,
        reader: MediaReader | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self._vocab_size = vocab_size
        self._max_len = max_len
        self._media = media
        self._reader = reader

    def encode(self, prompt: PromptLike) -> Prompt:
        """See `Engine.encode`."""
        if isinstance(prompt, Prompt):
            return prompt
        if isinstance(prompt, str):
            encoded = Prompt(tuple(self._tokenizer.encode_raw(prompt)))
        elif prompt and isinstance(prompt[0], Mapping):
            segments = self._chat_template.render(prompt)
            encoded = self._tokenizer.encode_prompt(self._read_segments(segments))
        else:
            encoded = Prompt(tuple(prompt))  # type: ignore[arg-type]
        self._check(encoded)
        return encoded

    def read_media(self, items: Sequence[MediaItem], options: MediaOptions) -> "list[Future[AnyMedia]]":
        """See `Engine.read_media`."""
        for item in items:
            if self._media is None or item.kind not in self._media.kinds:
                reads = "text only" if self._media is None else f"text, {' and '.join(self._media.kinds)}"
                raise UnsupportedMediaError(
                    f"{item.name or item.kind}: the loaded model reads {reads}, not {item.kind}"
                )
        if self._reader is None:
            return []
        budget = TokenBudget(self._max_len)
        return [self._reader.submit(item, options, budget) for item in items]

    def positions(self, prompt: Prompt) -> NDArray[np.int64] | None:
        """M-RoPE positions [3, num_tokens] of a prompt with media; `None` where they are 0, 1, 2, ..."""
        return mrope_positions(len(prompt), prompt.spans) if prompt.spans else None

    def positions_ahead(self, prompt: Prompt) -> int:
        """How far a prompt's positions reach beyond its length: long videos skip some."""
        positions = self.positions(prompt)
        return 0 if positions is None else max(0, int(positions.max()) + 1 - len(prompt))

    def close(self) -> None:
        """End the threads and processes that read media."""
        if self._reader is not None:
            self._reader.close()

    def _read_segments(self, segments: Sequence[Segment]) -> list[Segment]:
        """Placeholders in place of media, which are read side by side unless they have been read before."""
        reading: dict[int, Future[AnyMedia]] = {}
        for i, segment in enumerate(segments):
            if isinstance(segment, Media) and not isinstance(segment.item.source, AnyMedia):
                (reading[i],) = self.read_media([segment.item], MediaOptions())
        found: list[Segment] = []
        for i, segment in enumerate(segments):
            if isinstance(segment, Media):
                media = result_of(reading[i]) if i in reading else segment.item.source
                assert self._media is not None and isinstance(media, AnyMedia)
                segment = self._media.placeholder(media)
            found.append(segment)
        return found

    def _check(self, prompt: Prompt) -> None:
        for token_id in prompt.token_ids:
            if (
                isinstance(token_id, bool)
                or not isinstance(token_id, int)
                or not 0 <= token_id < self._vocab_size
            ):
                raise InvalidArgumentError(f"prompt: {token_id!r} is not a token id below {self._vocab_size}")
        if not prompt.token_ids:
            raise InvalidArgumentError("prompt: it is empty")
        if self._media is not None:
            placed = sum(run.end - run.start for run in prompt.media)
            if sum(token_id in self._media.pad_ids for token_id in prompt.token_ids) != placed:
                raise InvalidArgumentError(
                    "prompt: it holds a placeholder without a medium; give media in messages"
                )
