"""One engine step: schedule, run, and hand the results to the requests."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch

from flexjudge_fast.engine.batch import Batch
from flexjudge_fast.engine.model_runner import ModelRunner
from flexjudge_fast.engine.random import uniforms
from flexjudge_fast.engine.request import Request
from flexjudge_fast.engine.sampler import draw_of, log_probs, sample_among, top_log_probs
from flexjudge_fast.engine.scheduler import Scheduler
from flexjudge_fast.engine.stats import EngineStats
from flexjudge_fast.errors import NumericalError
from flexjudge_fast.ops.sample import Draw, sample_tokens
from flexjudge_fast.prompts.grammar import AnswerState


@dataclass(frozen=True)
class Drawn:
    """A token that the device drew with its logits still there, and the ids it could not be."""

    token_id: int
    banned: tuple[int, ...]


@dataclass(frozen=True)
class StepResult:
    """What a step gave.

    rows: of each chunk, as `row_ranges` gave them when the step was launched.
    logits: [num_rows, vocab_size]; finite: which rows are.
    """

    batch: Batch
    rows: tuple[range, ...]
    logits: torch.Tensor
    finite: Sequence[bool]
    drawn: Mapping[Request, Drawn] = field(default_factory=dict)


class Stepper:
    """Moves every request one step on. Not thread-safe: the engine holds its lock around each call.

    Args:
        deliver: called with each finished sample.
        forked: called with (parent, child) for each new sample or probe; gives the child its id.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: ModelRunner,
        deliver: Callable[[Request], None],
        forked: Callable[[Request, Request], None],
    ) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self._deliver = deliver
        self._forked = forked

    def step(self) -> None:
        """Schedule, run, postprocess. If anything raises, the batch's requests start over next time."""
        batch = self.scheduler.schedule()
        try:
            with self.runner.threads():
                rows = row_ranges(batch)
                self._postprocess(StepResult(batch, rows, *self.runner.run(batch)))
        except BaseException:
            self._start_over(batch)
            raise

    def cancel(self, request_ids: set[int]) -> None:
        """Forget requests and their probes."""
        for request in [*self.scheduler.running, *self.scheduler.waiting]:
            owner = request.parent or request
            if owner.id in request_ids:
                self.scheduler.remove(request)

    def stats(self) -> EngineStats:
        scheduler, encoder = self.scheduler, self.runner.encoder
        return EngineStats(
            num_blocks=scheduler.pool.num_blocks,
            num_used_blocks=scheduler.pool.num_used,
            num_free_blocks=scheduler.pool.num_free,
            num_cached_blocks=len(scheduler.cache),
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_preemptions=scheduler.num_preemptions,
            num_forward_tokens=self.runner.num_forward_tokens,
            num_prompt_tokens=scheduler.num_prompt_tokens,
            num_cached_tokens=scheduler.num_cached_tokens,
            num_encoded_media=0 if encoder is None else encoder.num_encoded,
            num_cached_media=0 if encoder is None else encoder.cache.num_hits + encoder.cache.num_store_hits,
        )

    def _start_over(self, batch: Batch) -> None:
        """The step of `batch` did not end well: its requests are computed anew."""
        ran = {chunk.request.id for chunk in batch.chunks}
        for request in [*self.scheduler.running, *self.scheduler.waiting]:
            if request.id in ran or not request.num_uncomputed:  # a fork that has not drawn yet
                self.scheduler.preempt(request)

    def _postprocess(self, result: StepResult) -> None:
        """Commit what was computed, and hand each request its rows."""
        self.scheduler.commit(result.batch)
        drawing: list[tuple[Request, int]] = []  # a sample that draws, and its row
        done: list[Request] = []
        for chunk, rows in zip(result.batch.chunks, result.rows, strict=True):
            request, positions = chunk.request, chunk.logit_positions
            if not positions or request.finish_reason is not None:
                continue
            if not all(result.finite[rows.start : rows.stop]):
                done += self._fail(request)
            elif request.all_logits or request.probe is not None:
                self._measure(request, result.logits[rows.start : rows.stop], positions.start)
                done.append(request)
            else:
                drawing += [(member, rows.stop - 1) for member in self._fork_samples(request)]
        self._finish_all(done)  # first: a failed probe ends its parent, which then draws no more
        drawing = [(request, row) for request, row in drawing if request.finish_reason is None]
        self._draw(drawing, result)
        self._finish_all(request for request, _ in drawing)

    def _finish_all(self, requests: Iterable[Request]) -> None:
        for request in requests:
            if request.finish_reason is not None:
                self._finish(request)

    def _measure(self, request: Request, rows: torch.Tensor, position: int) -> None:
        """Logits [n, vocab_size] from `position` on of a request that draws nothing."""
        if request.probe is not None:
            self._observe(request, rows, position)
            return
        if position == 0:
            request.logits.clear()  # it starts over after a preemption
        request.logits.append(rows.cpu().clone())
        if not request.num_uncomputed:
            request.finish("stop")

    def _fail(self, request: Request) -> list[Request]:
        """All samples of a request whose logits are not finite; its blocks may be bad, so none is kept."""
        for block_id in request.block_table:
            self.scheduler.cache.evict(block_id)
        members = [request] if request.probe is not None else self._fork_samples(request)
        for member in members:
            member.finish("error", NumericalError("the model's logits are NaN or infinite"))
        return members

    def _observe(self, request: Request, rows: torch.Tensor, position: int) -> None:
        """A probe's rows: the distribution after each of its forced tokens."""
        probe, parent = request.probe, request.parent
        assert probe is not None and parent is not None and parent.grammar is not None
        for row in rows:
            prefix = probe.prefix[: position - request.first_logit + 1]
            _read_distribution(parent.grammar, probe.slot, prefix, row)
            position += 1
        if not request.num_uncomputed:
            request.finish("stop")

    def _fork_samples(self, request: Request) -> list[Request]:
        """At its first draw a request with several samples becomes several, sharing the prompt's blocks."""
        children = []
        for index in range(1, request.samples):
            child = request.fork(0, index)
            children.append(child)
            self._start_fork(request, child)
        request.samples = 1
        return [request, *children]

    def _start_fork(self, parent: Request, child: Request) -> None:
        self._forked(parent, child)
        self.scheduler.share_blocks(parent, child)
        self.scheduler.add(child, front=True)

    def _draw(self, drawing: Sequence[tuple[Request, int]], result: StepResult) -> None:
        """Sample everyone's next token; at the start of a score, also ask for the score's distribution."""
        tokens: dict[Request, int] = {}
        logits = result.logits
        free: defaultdict[tuple[int, ...], dict[Request, Draw]] = defaultdict(dict)  # by what is banned
        for request, row in drawing:
            grammar = request.grammar
            slot = None if grammar is None else grammar.slot_start()
            if grammar is not None and slot is not None:
                _read_distribution(grammar, slot, (), logits[row])
                for probe in grammar.probes():
                    self._start_fork(request, request.fork_probe(0, probe))
            allowed = None if grammar is None else grammar.allowed()
            banned = request.masked if grammar is None else grammar.banned()
            drawn = result.drawn.get(request)
            if allowed is None and drawn is not None and drawn.banned == banned:
                tokens[request] = drawn.token_id
                continue
            (uniform,) = uniforms_of([(request, len(request.token_ids))])
            draw = draw_of(request.params, row, uniform)
            if allowed is None:
                free[banned][request] = draw
            else:
                tokens[request] = sample_among(logits, draw, allowed)
        for banned, draws in free.items():
            found = sample_tokens(logits, list(draws.values()), banned, self.runner.num_threads)
            tokens.update(zip(draws, found, strict=True))
        for request, row in drawing:
            if request.grammar is None and request.params.logprobs is not None:
                request.logprobs.append(top_log_probs(logits[row], tokens[request], request.params.logprobs))
            request.append(tokens[request])

    def _finish(self, request: Request) -> None:
        """Release a finished request; a sample is delivered once its last probe has reported."""
        self.scheduler.remove(request)
        parent = request.parent
        if parent is not None:
            parent.open_probes -= 1
            if request.error is not None and parent.error is None:
                parent.finish_reason, parent.error = "error", request.error
                self.scheduler.remove(parent)  # does nothing for one that is out already
            request = parent
        if request.finish_reason is not None and request.open_probes == 0:
            self._deliver(request)


def row_ranges(batch: Batch) -> tuple[range, ...]:
    """The rows of a step's logits that belong to each chunk."""
    counts = [len(chunk.logit_positions) for chunk in batch.chunks]
    return tuple(range(end - n, end) for n, end in zip(counts, accumulate(counts), strict=True))


def uniforms_of(places: Sequence[tuple[Request, int]]) -> list[float]:
    """Each request's random number for its token at this position; greedy ones do not look at theirs."""
    if all(request.params.temperature == 0 for request, _ in places):
        return [0.0] * len(places)
    return uniforms([(r.params.seed, r.key, r.sample_index, position) for r, position in places])


def _read_distribution(grammar: AnswerState, slot: int, prefix: tuple[int, ...], row: torch.Tensor) -> None:
    """Report the logits [vocab_size] after `prefix` to the grammar, where legal values part there."""
    ids = grammar.watch(slot, prefix)
    if ids:
        grammar.observe(slot, prefix, dict(zip(ids, log_probs(row, ids), strict=True)))
