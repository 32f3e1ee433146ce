"""One engine step: schedule, run, and hand the results to the requests."""

from collections.abc import Callable

import torch

from flexjudge_fast.engine.batch import Batch
from flexjudge_fast.engine.model_runner import ModelRunner
from flexjudge_fast.engine.random import uniform
from flexjudge_fast.engine.request import Request
from flexjudge_fast.engine.sampler import log_probs, sample_token, top_log_probs
from flexjudge_fast.engine.scheduler import Scheduler
from flexjudge_fast.engine.stats import EngineStats
from flexjudge_fast.errors import NumericalError
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
                logits = self.runner.run(batch)
                self._postprocess(batch, logits)
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
        scheduler = self.scheduler
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
        )

    def _postprocess(self, batch: Batch, logits: torch.Tensor) -> None:
        """logits: [num_rows, vocab_size], the chunks' `logit_positions` in order."""
        self.scheduler.commit(batch)
        row = 0
        for chunk in batch.chunks:
            rows = logits[row : row + len(chunk.logit_positions)]
            row += len(rows)
            if len(rows) and chunk.request.finish_reason is None:
                self._take(chunk.request, rows, chunk.logit_positions.start)

    def _take(self, request: Request, rows: torch.Tensor, position: int) -> None:
        """Logits [n, vocab_size] from `position` on belong to `request`."""
        members = [request]
        if not bool(torch.isfinite(rows).all()):
            members = self._fail(request)
        elif request.all_logits:
            if position == 0:
                request.logits.clear()  # it starts over after a preemption
            request.logits.append(rows.cpu().clone())
            if not request.num_uncomputed:
                request.finish("stop")
        elif request.probe is not None:
            self._observe(request, rows, position)
        else:
            members = self._fork_samples(request)
            for member in members:
                self._draw(member, rows[-1])
        for member in members:
            if member.finish_reason is not None:
                self._finish(member)

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

    def _draw(self, request: Request, row: torch.Tensor) -> None:
        """Sample the next token; at the start of a score, also ask for the score's distribution."""
        params, grammar = request.params, request.grammar
        position = len(request.token_ids)
        draw = (
            uniform(params.seed, request.key, request.sample_index, position) if params.temperature else 0.0
        )
        if grammar is None:
            token_id = sample_token(row, params, draw)
            if params.logprobs is not None:
                request.logprobs.append(top_log_probs(row, token_id, params.logprobs))
        else:
            slot = grammar.slot_start()
            if slot is not None:
                _read_distribution(grammar, slot, (), row)
                for probe in grammar.probes():
                    self._start_fork(request, request.fork_probe(0, probe))
            token_id = sample_token(row, params, draw, grammar.allowed(), grammar.banned())
        request.append(token_id)

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


def _read_distribution(grammar: AnswerState, slot: int, prefix: tuple[int, ...], row: torch.Tensor) -> None:
    """Report the logits [vocab_size] after `prefix` to the grammar, where legal values part there."""
    ids = grammar.watch(slot, prefix)
    if ids:
        grammar.observe(slot, prefix, dict(zip(ids, log_probs(row, ids), strict=True)))
