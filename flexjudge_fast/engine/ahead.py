"""Steps for a device that computes on its own: the next is launched before the last one's tokens are read."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace

from flexjudge_fast.engine.batch import Batch, Chunk
from flexjudge_fast.engine.launch import Behind, DeviceDraw, InFlight, LaunchingRunner
from flexjudge_fast.engine.model_runner import ModelRunner
from flexjudge_fast.engine.request import Request
from flexjudge_fast.engine.sampler import draw_of
from flexjudge_fast.engine.scheduler import Scheduler
from flexjudge_fast.engine.step import Drawn, Stepper, StepResult, row_ranges, uniforms_of


@dataclass(frozen=True)
class _Flight:
    """A launched step and what was known at its launch.

    unknown: requests whose token only the device knew then. fed: what it was, once the host knows it, too.
    """

    batch: Batch
    preempted: tuple[int, ...]  # how often, each chunk's request: since then, its blocks are others
    rows: tuple[range, ...]
    draws: tuple[DeviceDraw, ...]
    under_way: InFlight
    unknown: frozenset[Request]
    fed: Mapping[Request, Drawn] = field(default_factory=dict)

    def valid(self, running: Collection[Request]) -> list[int]:
        """Its chunks whose requests are still there and began with the right token; the others are void."""
        return [
            i
            for i, (chunk, times) in enumerate(zip(self.batch.chunks, self.preempted, strict=True))
            if chunk.request in running and chunk.request.num_preemptions == times and self._fits(chunk)
        ]

    def result(self, running: Collection[Request]) -> StepResult:
        """What it gave to the valid chunks."""
        found = self.under_way.wait()
        drawn = {d.request: Drawn(token, d.banned) for d, token in zip(self.draws, found.tokens, strict=True)}
        there = self.valid(running)
        return StepResult(
            replace(self.batch, chunks=tuple(self.batch.chunks[i] for i in there)),
            tuple(self.rows[i] for i in there),
            found.logits,
            found.finite,
            drawn,
        )

    def _fits(self, chunk: Chunk) -> bool:
        """Whether the request took the token that the device went on with: one that ends its turn is not."""
        fed = self.fed.get(chunk.request)
        return fed is None or chunk.request.token_ids[chunk.start] == fed.token_id


class AheadStepper(Stepper):
    """One step ahead of the device, as long as most requests go on whatever the device draws.

    A step is launched ahead with tokens that only the device knows yet, more of the prompts under way, and
    who was not in the step before. A request that the host decides about (an answer's slot, a fork) sits the
    step out. What the host learns later (a stop, an answer that begins, a cancelled request) may make a
    request's share of it void: its row is not read, and the slots that it wrote are never marked computed.
    Draws depend on seed, prompt, sample and position, so they are those of `Stepper`.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: "LaunchingRunner",
        deliver: Callable[[Request], None],
        forked: Callable[[Request, Request], None],
    ) -> None:
        super().__init__(scheduler, runner, deliver, forked)  # type: ignore[arg-type]
        self._launching = runner
        self._flight: _Flight | None = None
        self.num_ahead = 0  # steps that were launched ahead

    def step(self) -> None:
        """Take the step that is under way, or start one; launch the next; hand out results of the first."""
        flight, self._flight = self._flight, None
        if flight is None:
            flight = self._launch(self.scheduler.schedule())
        ahead = None
        try:
            ahead = self._launch_ahead(flight)
            with self._launching.beside():
                result = flight.result(set(self.scheduler.running))
                self._postprocess(result)
            if ahead is not None:
                fed = {request: d for request, d in result.drawn.items() if request in ahead.unknown}
                self._flight = replace(ahead, fed=fed)
                self._forget_void()
        except BaseException:
            for under_way in (flight, ahead):
                if under_way is not None:
                    self._start_over(under_way.batch)
            raise

    def cancel(self, request_ids: set[int]) -> None:
        """See `Stepper.cancel`. A step that is under way for none but them is forgotten."""
        super().cancel(request_ids)
        self._forget_void()

    def _forget_void(self) -> None:
        """Nobody waits for a step of which nothing is valid."""
        if self._flight is not None and not self._flight.valid(set(self.scheduler.running)):
            self._flight = None

    def _launch(self, batch: Batch, behind: _Flight | None = None, keep: bool = False) -> _Flight:
        """Start a step. If that fails, its requests start over, as blocks may have been copied in it."""
        try:
            return self._try_launch(batch, behind, keep)
        except BaseException:
            self._start_over(batch)
            raise

    def _try_launch(self, batch: Batch, behind: _Flight | None, keep: bool) -> _Flight:
        rows = row_ranges(batch)
        drawing: list[tuple[Chunk, int, tuple[int, ...]]] = []  # with their rows and banned ids
        for chunk, own in zip(batch.chunks, rows, strict=True):
            banned = free_draw(chunk.request) if own else None
            if banned is not None:
                drawing.append((chunk, own.stop - 1, banned))
        numbers = uniforms_of([(chunk.request, chunk.end) for chunk, _, _ in drawing])
        draws = [
            DeviceDraw(chunk.request, draw_of(chunk.request.params, row, number), banned)
            for (chunk, row, banned), number in zip(drawing, numbers, strict=True)
        ]
        unknown = {c.request: i for i, c in enumerate(batch.chunks) if c.end > len(c.request.token_ids)}
        before = None
        if behind is not None:
            feed = {unknown[d.request]: i for i, d in enumerate(behind.draws) if d.request in unknown}
            before = Behind(behind.under_way, feed, keep)
        preempted = tuple(chunk.request.num_preemptions for chunk in batch.chunks)
        under_way = self._launching.launch(batch, draws, before)
        return _Flight(batch, preempted, rows, tuple(draws), under_way, frozenset(unknown))

    def _launch_ahead(self, flight: _Flight) -> _Flight | None:
        """The step after `flight`, if most of its requests go on; else all had better wait for each other."""
        valid = [flight.batch.chunks[i] for i in flight.valid(set(self.scheduler.running))]
        draws = {draw.request: draw for draw in flight.draws}
        following, keep = {}, False
        for chunk in valid:
            draw = draws.get(chunk.request)
            is_free = draw is not None and free_draw(chunk.request) == draw.banned
            following[chunk.request] = _following(chunk, is_free)
            keep |= bool(chunk.logit_positions) and not is_free
        num_following = sum(chunk is not None for chunk in following.values())
        if not num_following or 2 * num_following < len(valid):
            return None
        batch = self.scheduler.schedule_ahead(following)
        if batch is None:
            return None
        self.num_ahead += 1
        return self._launch(batch, flight, keep)


def _following(chunk: Chunk, is_free: bool) -> Chunk | None:
    """What a request goes on with after `chunk`, which is under way; `None` if the host must decide that.

    is_free: its next token is the one that the device draws.
    """
    request, at = chunk.request, chunk.end
    if at < len(request.token_ids):
        return None if request.all_logits else Chunk(request, at, len(request.token_ids) - at)
    return Chunk(request, at, 1) if is_free and at + 1 < request.max_len else None


def make_stepper(
    scheduler: Scheduler,
    runner: ModelRunner,
    deliver: Callable[[Request], None],
    forked: Callable[[Request, Request], None],
) -> Stepper:
    """One step ahead where the runner can launch steps."""
    if isinstance(runner, LaunchingRunner):
        return AheadStepper(scheduler, runner, deliver, forked)
    return Stepper(scheduler, runner, deliver, forked)


def free_draw(request: Request) -> tuple[int, ...] | None:
    """The ids that the request's next token cannot be; `None` if the host has a say in it."""
    grammar = request.grammar
    if request.samples > 1 or request.probe is not None or request.all_logits:
        return None
    if grammar is None:
        return request.masked if request.params.logprobs is None else None
    if grammar.slot_start() is not None or grammar.allowed() is not None or grammar.forced():
        return None
    return grammar.banned()
