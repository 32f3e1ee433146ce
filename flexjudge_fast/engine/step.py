"""One engine step: schedule, run, and hand the results to the requests."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

import torch

from flexjudge_fast.engine.batch import Batch
from flexjudge_fast.engine.model_runner import ModelRunner
from flexjudge_fast.engine.random import uniform
from flexjudge_fast.engine.request import Request
from flexjudge_fast.engine.sampler import draw_of, log_probs, sample_among, top_log_probs
from flexjudge_fast.engine.scheduler import Scheduler
from flexjudge_fast.engine.stats import EngineStats
from flexjudge_fast.errors import NumericalError
from flexjudge_fast.ops.sample import Draw, sample_tokens
from flexjudge_fast.prompts.grammar import AnswerState


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
                self._postprocess(batch, *self.runner.run(batch))
        except BaseException:
            ran = {chunk.request.id for chunk in batch.chunks}
            for request in [*self.scheduler.running, *self.scheduler.waiting]:
                if request.id in ran or not request.num_uncomputed:  # a fork that has not drawn yet
                    self.scheduler.preempt(request)
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

    def _postprocess(self, batch: Batch, logits: torch.Tensor, finite: Sequence[bool]) -> None:
        """logits: [num_rows, vocab_size], of the chunks' `logit_positions`; `finite`: which rows are."""
        self.scheduler.commit(batch)
        drawing: list[tuple[Request, int]] = []  # a sample that draws, and its row
        done: list[Request] = []
        end = 0
        for chunk in batch.chunks:
            request, begin = chunk.request, end
            end += len(chunk.logit_positions)
            if begin == end or request.finish_reason is not None:
                continue
            if not all(finite[begin:end]):
                done += self._fail(request)
            elif request.all_logits or request.probe is not None:
                self._measure(request, logits[begin:end], chunk.logit_positions.start)
                done.append(request)
            else:
                drawing += [(member, end - 1) for member in self._fork_samples(request)]
        self._finish_all(done)  # first: a failed probe ends its parent, which then draws no more
        drawing = [(request, row) for request, row in drawing if request.finish_reason is None]
        self._draw(drawing, logits)
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

    def _draw(self, drawing: Sequence[tuple[Request, int]], logits: torch.Tensor) -> None:
        """Sample everyone's next token; at the start of a score, also ask for the score's distribution."""
        tokens: dict[Request, int] = {}
        free: defaultdict[tuple[int, ...], dict[Request, Draw]] = defaultdict(dict)  # by what is banned
        for request, row in drawing:
            draw = draw_of(request.params, row, _uniform(request))
            grammar = request.grammar
            if grammar is None:
                free[()][request] = draw
                continue
            slot = grammar.slot_start()
            if slot is not None:
                _read_distribution(grammar, slot, (), logits[row])
                for probe in grammar.probes():
                    self._start_fork(request, request.fork_probe(0, probe))
            allowed = grammar.allowed()
            if allowed is None:
                free[grammar.banned()][request] = draw
            else:
                tokens[request] = sample_among(logits, draw, allowed)
        for banned, draws in free.items():
            drawn = sample_tokens(logits, list(draws.values()), banned, self.runner.num_threads)
            tokens.update(zip(draws, drawn, strict=True))
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


def _uniform(request: Request) -> float:
    """The request's next random number; 0 when it is greedy."""
    params = request.params
    if params.temperature == 0:
        return 0.0
    return uniform(params.seed, request.key, request.sample_index, len(request.token_ids))


def _read_distribution(grammar: AnswerState, slot: int, prefix: tuple[int, ...], row: torch.Tensor) -> None:
    """Report the logits [vocab_size] after `prefix` to the grammar, where legal values part there."""
    ids = grammar.watch(slot, prefix)
    if ids:
        grammar.observe(slot, prefix, dict(zip(ids, log_probs(row, ids), strict=True)))
