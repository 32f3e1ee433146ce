"""One sequence being generated: its tokens, its KV blocks, its answer state."""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from flexjudge_fast.engine.prefix_cache import ROOT, BlockContent
from flexjudge_fast.engine.sampling_params import SamplingParams
from flexjudge_fast.media.prepared import MediaRun
from flexjudge_fast.prompts.grammar import AnswerState, Probe


class TokenText(Protocol):
    """What a request needs of the tokenizer."""

    def token_bytes(self, token_id: int) -> bytes: ...


@dataclass
class Timings:
    """`time.perf_counter()` seconds; 0 where it has not happened."""

    arrival: float = 0.0
    first_token: float = 0.0
    finished: float = 0.0


@dataclass(eq=False)
class Request:
    """A prompt and what has been generated for it.

    `samples` > 1 forks the request when the first token is drawn. A request with a `probe` only measures
    the distribution after a few forced tokens of its `parent`; one with `all_logits` measures the prompt.
    """

    id: int
    prompt: tuple[int, ...]
    params: SamplingParams
    text: TokenText
    stop_ids: frozenset[int]
    max_len: int
    grammar: AnswerState | None = None
    media: tuple[MediaRun, ...] = ()
    positions: NDArray[np.int64] | None = (
        None  # of the prompt, [3, num_tokens], where they are not 0, 1, 2, ...
    )
    masked: tuple[int, ...] = ()  # ids that are never drawn
    all_logits: bool = False
    sample_index: int = 0
    samples: int = 1
    parent: "Request | None" = None
    probe: Probe | None = None
    token_ids: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_preemptions: int = 0
    num_cached: int | None = None  # tokens found in the prefix cache at first admission
    block_table: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)  # of the full blocks of token_ids
    output: bytearray = field(default_factory=bytearray)
    logprobs: list[dict[int, float]] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)
    finish_reason: str | None = None
    error: Exception | None = None
    open_probes: int = 0
    timings: Timings = field(default_factory=Timings)

    def __post_init__(self) -> None:
        if not self.token_ids:
            self.token_ids = list(self.prompt)
            self.timings.arrival = time.perf_counter()
            digest = hashlib.blake2b(repr((self.prompt, self.media_keys)).encode(), digest_size=8)
            self.key = int.from_bytes(digest.digest(), "little")
            self._follow_grammar()

    @property
    def media_keys(self) -> tuple[tuple[int, int, bytes], ...]:
        """First position, end position and content key of each medium."""
        return tuple((run.start, run.end, run.media.key) for run in self.media)

    @cached_property
    def position_offset(self) -> int:
        """A generated token's position less its place in the sequence (M-RoPE's delta)."""
        return 0 if self.positions is None else int(self.positions.max()) + 1 - len(self.prompt)

    def positions_of(self, start: int, end: int) -> NDArray[np.int64]:
        """RoPE positions of the tokens [start, end): [num_tokens], or [3, num_tokens]."""
        plain = np.arange(start, end)
        if self.positions is None:
            return plain
        known = self.positions[:, start:end]  # none of them for generated tokens
        rest = plain[known.shape[1] :] + self.position_offset
        return np.concatenate((known, np.broadcast_to(rest, (3, len(rest)))), axis=1)

    @property
    def num_uncomputed(self) -> int:
        return len(self.token_ids) - self.num_computed

    @property
    def first_logit(self) -> int:
        """The first position whose logits are needed; no position from here on may come from a cache."""
        if self.all_logits:
            return 0
        if self.probe is not None:
            return len(self.token_ids) - len(self.probe.prefix)
        return len(self.token_ids) - 1

    def fork(self, request_id: int, sample_index: int) -> "Request":
        """Another sample of the same prompt, at the same place. The scheduler shares the blocks."""
        child = self._copy(request_id, sample_index)
        child.grammar = None if self.grammar is None else self.grammar.fork()
        child.output = bytearray(self.output)
        child.logprobs = list(self.logprobs)
        child.timings.arrival = self.timings.arrival
        return child

    def fork_probe(self, request_id: int, probe: Probe) -> "Request":
        """A request that forces the probe's tokens after this request's and measures the logits there."""
        child = self._copy(request_id, self.sample_index)
        child.parent, child.probe = self, probe
        child.token_ids += probe.prefix
        self.open_probes += 1
        return child

    def _copy(self, request_id: int, sample_index: int) -> "Request":
        child = Request(
            request_id,
            self.prompt,
            self.params,
            self.text,
            self.stop_ids,
            self.max_len,
            media=self.media,
            positions=self.positions,
            masked=self.masked,
            sample_index=sample_index,
            token_ids=list(self.token_ids),
            num_computed=self.num_computed,
            num_cached=self.num_computed,
            digests=list(self.digests),
        )
        child.key = self.key
        return child

    def append(self, token_id: int) -> None:
        """Take a sampled token: it ends the request, ends the reasoning, or is appended."""
        if not self.timings.first_token:
            self.timings.first_token = time.perf_counter()
        if token_id in self.stop_ids:
            if self.grammar is None:
                self.finish("stop")
                return
            self.grammar.close()
        else:
            self._push(token_id)
            if self.grammar is not None:
                self.grammar.advance(token_id)
        self._follow_grammar()
        if self.grammar is None and self.finish_reason is None:
            self._check_stop_strings()
        if self.finish_reason is None and len(self.token_ids) >= self.max_len:
            self.finish("length")

    def _follow_grammar(self) -> None:
        """Append what the grammar forces, and close the reasoning while the answer still fits."""
        grammar = self.grammar
        if grammar is None:
            return
        while not grammar.finished():
            forced = grammar.forced()
            for token_id in forced:
                self._push(token_id)
                grammar.advance(token_id)
            if not forced:
                if self.max_len - len(self.token_ids) > grammar.reserve():
                    return
                grammar.close()
                if not grammar.forced():
                    return
        self.finish("answer")

    def _push(self, token_id: int) -> None:
        self.token_ids.append(token_id)
        self.output += self.text.token_bytes(token_id)

    def _check_stop_strings(self) -> None:
        for stop in self.params.stop:
            at = self.output.find(stop.encode())
            if at >= 0:
                del self.output[at:]
                self.finish("stop")

    def finish(self, reason: str, error: Exception | None = None) -> None:
        if self.finish_reason is None:
            self.finish_reason, self.error = reason, error
            self.timings.finished = time.perf_counter()

    def block_content(self, index: int, block_size: int) -> BlockContent:
        """What full block number `index` holds."""
        start, end = index * block_size, (index + 1) * block_size
        parent = self.digests[index - 1] if index else ROOT
        return BlockContent(parent, tuple(self.token_ids[start:end]), self.media_in(start, end))

    def media_in(self, start: int, end: int) -> tuple[bytes, ...]:
        return tuple(run.media.key for run in self.media if run.start < end and run.end > start)

    def extend_digests(self, block_size: int) -> Sequence[bytes]:
        """Digests of all full blocks of `token_ids`, computed once each."""
        for index in range(len(self.digests), len(self.token_ids) // block_size):
            self.digests.append(self.block_content(index, block_size).digest())
        return self.digests
