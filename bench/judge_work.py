"""The judge's work: pairs in both orders with four votes each, ours against llama.cpp on the same prompts.

Ours is `Judge.run` over all pairs at once, with a cold cache in every round. llama.cpp gets the very prompts
that ours made, and draws as many tokens for each vote as ours did, in two ways:

- vote by vote, as its high-level API and its server do: each prompt continues whatever prefix of the one
  before is still in the KV cache, so the rubric is computed once and votes two to four compute one token;
- sixteen votes side by side through the low-level API: the prompt of four requests is computed once each,
  from the longest prefix any of them shares, copied to four sequences each, and all are decoded in one batch.

Both start with the rubric in the cache, and get the grammar's opening as part of the prompt. They take
some of the pairs in each round, others in the next, and are compared by generated tokens a second.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.engines import MissingError
from bench.engines.llama_cpp import Context, Settings
from bench.pairs import RUBRIC, make_pairs, seconds_to_judge
from bench.rounds import Row
from flexjudge_fast import Engine, Judgement
from flexjudge_fast.engine.completion import Completion
from flexjudge_fast.engine.engine import EngineOutput
from flexjudge_fast.prompts.formats import THINK_OPEN

TASK = "the judge's work"
GROUP, CHUNK = 4, 512  # requests side by side; tokens of a `llama_decode`


@dataclass(frozen=True)
class Work:
    """How much there is to judge, and how many pairs of it llama.cpp takes in a round."""

    pairs: int = 32
    votes: int = 4
    think_tokens: int = 32
    peer_pairs: int = 4


@dataclass(frozen=True)
class Request:
    """One prompt as ours made it, and how many tokens each vote generated; `opening` of them were forced."""

    prompt: tuple[int, ...]
    opening: tuple[int, ...]
    lengths: tuple[int, ...]

    @property
    def generated(self) -> int:
        return sum(self.lengths)


class RecordingEngine:
    """An engine that keeps the completions it gives out."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.completions: list[tuple[Completion, ...]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def run(self, *args: Any) -> Iterator[EngineOutput]:
        for output in self.engine.run(*args):
            self.completions.append(output.completions)
            yield output


def judge_with_ours(
    model: Path, activations: str, threads: int, work: Work
) -> tuple[float, list[tuple[Completion, ...]]]:
    """Seconds of the whole job with a cold cache, and what was generated for each prompt."""
    engine = Engine.from_pretrained(
        model, max_model_len=2048, kv_cache_memory="2GiB", activations=activations, num_threads=threads
    )
    try:
        engine.generate(["Good morning."])  # pages and threads are there before the clock runs
        _ = engine.provenance
        recording = RecordingEngine(engine)
        items = [
            Judgement(
                "pair",
                question,
                answers,
                rubric=RUBRIC,
                votes=work.votes,
                order="both",
                max_think_tokens=work.think_tokens,
            )
            for question, answers in make_pairs(work.pairs)
        ]
        return seconds_to_judge(recording, items), recording.completions
    finally:
        engine.close()


def as_requests(completions: Sequence[tuple[Completion, ...]], opening: Sequence[int]) -> list[Request]:
    """What llama.cpp is to do: the prompts sorted, so that those that share most stand together."""
    found = [
        Request(c[0].prompt_token_ids, tuple(opening), tuple(len(vote.token_ids) for vote in c))
        for c in completions
    ]
    return sorted(found, key=lambda request: request.prompt)


class LlamaJudge:
    """llama.cpp on the same requests, its KV cache reused in one of the two ways."""

    def __init__(self, model: Path, label: str, threads: int, side_by_side: bool) -> None:
        self._side_by_side = side_by_side
        self._seqs = 4 * GROUP + 1 if side_by_side else 1
        self._run = Context(model, threads, Settings(True, True), CHUNK, self._seqs)
        self.name = f"llama.cpp, {'sixteen votes side by side' if side_by_side else 'vote by vote'}, {label}"
        self._sampler = self._run.sampler(40, 0.8, 0.4, 1)
        self._held: dict[int, tuple[int, ...]] = {}  # what each sequence's cache holds

    def work(self, requests: Sequence[Request]) -> float:
        """Generated tokens a second; the prefix that all prompts share is computed before."""
        self._run.clear()
        self._held = {}
        shared = _common(requests[0].prompt, requests[-1].prompt)  # they are sorted
        self._feed(requests[0].prompt[:shared], 0, self._seqs - 1)
        self._held[self._seqs - 1] = requests[0].prompt[:shared]
        start = time.perf_counter()
        if self._side_by_side:
            for first in range(0, len(requests), GROUP):
                self._group(requests[first : first + GROUP])
        else:
            for request in requests:
                for length in request.lengths:
                    self._vote(request, length)
        return sum(r.generated for r in requests) / (time.perf_counter() - start)

    def close(self) -> None:
        self._run.llama.llama_sampler_free(self._sampler)
        self._run.close()

    def _vote(self, request: Request, length: int) -> None:
        """One vote in sequence 0, from the prefix that is still there."""
        prompt = request.prompt + request.opening
        kept = min(_common(self._held[0], prompt), len(prompt) - 1)
        self._run.llama.llama_memory_seq_rm(self._run.memory, 0, kept, -1)
        row = self._feed(prompt[kept:], kept, 0)
        for i in range(length - len(request.opening)):
            token = self._run.draw(self._sampler, row)
            if i + 1 < length - len(request.opening):
                self._run.feed([token], [len(prompt) + i], [0], [0])
            row = 0
        self._held[0] = prompt

    def _group(self, requests: Sequence[Request]) -> None:
        """Some requests and all their votes: each prompt once, then every vote in one batch."""
        run, copy = self._run, self._run.llama.llama_memory_seq_cp
        open_votes: dict[int, tuple[int, int, int]] = {}  # sequence: token, position, tokens to come
        for place, request in enumerate(requests):
            prompt, seq = request.prompt + request.opening, place * len(request.lengths)
            source = max(self._held, key=lambda s: _common(self._held[s], prompt))
            kept = min(_common(self._held[source], prompt), len(prompt) - 1)
            copy(run.memory, source, seq, 0, kept)
            row = self._feed(prompt[kept:], kept, seq)
            self._held[seq] = prompt
            for vote, length in enumerate(request.lengths):
                if vote:
                    copy(run.memory, seq, seq + vote, 0, -1)
                token = run.draw(self._sampler, row)
                open_votes[seq + vote] = (token, len(prompt), length - len(request.opening) - 1)
        while open_votes := {seq: vote for seq, vote in open_votes.items() if vote[2]}:
            votes = list(open_votes.values())
            rows = range(len(votes))
            run.feed([v[0] for v in votes], [v[1] for v in votes], list(open_votes), rows)
            drawn = [run.draw(self._sampler, row) for row in rows]
            open_votes = {
                seq: (token, at + 1, left - 1)
                for (seq, (_, at, left)), token in zip(open_votes.items(), drawn, strict=True)
            }
        for seq in range(self._seqs - 1):
            run.llama.llama_memory_seq_rm(run.memory, seq, -1, -1)
            self._held.pop(seq, None)

    def _feed(self, tokens: Sequence[int], start: int, seq: int) -> int:
        """A prompt's tokens in chunks; the row of the last one's logits."""
        for at in range(0, len(tokens), CHUNK):
            part = tokens[at : at + CHUNK]
            positions = range(start + at, start + at + len(part))
            self._run.feed(part, positions, [seq] * len(part), [len(part) - 1])
        return len(part) - 1


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def measure_judge(
    part: str, model: Path, peers: Sequence[tuple[Path, str, bool]], threads: int, rounds: int, work: Work
) -> list[Row]:
    """Ours (int16, int8) and llama.cpp in turns.

    peers: the file, a label, and whether votes run side by side.
    """
    rows: list[Row] = []
    opened: list[LlamaJudge] = []
    for path, label, side_by_side in peers:
        try:
            opened.append(LlamaJudge(path, label, threads, side_by_side))
        except MissingError as error:
            way = "sixteen votes side by side" if side_by_side else "vote by vote"
            rows.append(Row(part, f"llama.cpp, {way}, {label}", TASK, missing=str(error)))
    samples: dict[str, list[float]] = {}
    notes: dict[str, str] = {}
    torch.set_num_threads(threads)
    for turn in range(rounds):
        requests: list[Request] = []
        for activations in ("int16", "int8"):
            name = f"ours, {activations}"
            seconds, completions = judge_with_ours(model, activations, threads, work)
            opening = _opening(completions)
            mine = as_requests(completions, opening)
            samples.setdefault(name, []).append(sum(r.generated for r in mine) / seconds)
            requests = requests or mine
            notes[name] = _describe(mine)
        for peer in opened:
            count = 2 * work.peer_pairs
            first = turn * count % len(requests)
            samples.setdefault(peer.name, []).append(peer.work(requests[first : first + count]))
            notes[peer.name] = f"{work.peer_pairs} of the {work.pairs} pairs a round"
    for peer in opened:
        peer.close()
    return rows + [Row(part, name, TASK, samples=tuple(s), note=notes[name]) for name, s in samples.items()]


def _opening(completions: Sequence[tuple[Completion, ...]]) -> tuple[int, ...]:
    """The forced tokens that every vote begins with."""
    votes = [vote.token_ids for group in completions for vote in group]
    assert all(vote.text.startswith(THINK_OPEN) for group in completions for vote in group)
    low, high = min(votes), max(votes)
    return low[: _common(low, high)]


def _describe(requests: Sequence[Request]) -> str:
    votes = sum(len(r.lengths) for r in requests)
    prompt = sum(len(r.prompt) for r in requests) / len(requests)
    shared = _common(requests[0].prompt, requests[-1].prompt)
    generated = sum(r.generated for r in requests) / votes
    return f"{votes} votes, prompts of {prompt:.0f} tokens ({shared} shared), {generated:.0f} tokens a vote"
