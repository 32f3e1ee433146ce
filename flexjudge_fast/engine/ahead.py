"""Steps for a device that computes on its own: the next is launched before the last one's tokens are read."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace

from flexjudge_fast.engine.batch import Batch, Chunk
from flexjudge_fast.engine.launch import DeviceDraw, InFlight, LaunchingRunner
from flexjudge_fast.engine.model_runner import ModelRunner
from flexjudge_fast.engine.request import Request
from flexjudge_fast.engine.sampler import draw_of
from flexjudge_fast.engine.scheduler import Scheduler
from flexjudge_fast.engine.step import Drawn, Stepper, StepResult, row_ranges, uniforms_of


@dataclass(frozen=True)
class _Flight:
    """A launched step and what was known at its launch. fed: the tokens that only the device knew then."""

    batch: Batch
    rows: tuple[range, ...]
    draws: tuple[DeviceDraw, ...]
    under_way: InFlight
    fed: Mapping[Request, Drawn] = field(default_factory=dict)

    def result(self, running: Collection[Request]) -> StepResult:
        """What it gave to those that are there and began with the right token; other chunks are void."""
        found = self.under_way.wait()
        drawn = {d.request: Drawn(token, d.banned) for d, token in zip(self.draws, found.tokens, strict=True)}
        there = [
            i for i, chunk in enumerate(self.batch.chunks) if chunk.request in running and self._fits(chunk)
        ]
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
    """One step ahead of the device, as long as every running request just goes on drawing tokens.

    A step is launched ahead with tokens that only the device knows yet. What the host learns later (a stop,
    an answer that begins, a cancelled request) may make a request's share of it void: its row is not read,
    and the slots that it wrote are never marked computed. Draws depend on seed, prompt, sample and position,
    so they are those of `Stepper`. Anything but going on, such as a new prompt, is scheduled by plain steps.
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
        batches: list[Batch] = [] if flight is None else [flight.batch]
        try:
            if flight is None:
                batch = self.scheduler.schedule()
                batches.append(batch)
                flight = self._launch(batch, None)
            ahead = self._launch_ahead(flight)
            if ahead is not None:
                batches.append(ahead.batch)
            result = flight.result(set(self.scheduler.running))
            self._postprocess(result)
            if ahead is not None and not {c.request for c in ahead.batch.chunks}.isdisjoint(
                self.scheduler.running
            ):
                self._flight = replace(ahead, fed=result.drawn)
        except BaseException:
            for batch in batches:
                self._start_over(batch)
            raise

    def _launch(self, batch: Batch, behind: _Flight | None) -> _Flight:
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
        feed: dict[int, int] = {}
        if behind is not None:
            places = {draw.request: i for i, draw in enumerate(behind.draws)}
            feed = {i: places[chunk.request] for i, chunk in enumerate(batch.chunks)}
        under_way = self._launching.launch(batch, draws, None if behind is None else behind.under_way, feed)
        return _Flight(batch, rows, tuple(draws), under_way)

    def _launch_ahead(self, flight: _Flight) -> _Flight | None:
        """The step after `flight`, if all that runs goes on, and nothing that waits could join."""
        scheduler = self.scheduler
        running = set(scheduler.running)
        going_on = running.intersection(draw.request for draw in flight.draws)
        if not running or going_on != running:
            return None
        if scheduler.waiting and len(scheduler.running) < scheduler.limits.max_num_seqs:
            return None
        if any(free_draw(draw.request) != draw.banned for draw in flight.draws if draw.request in running):
            return None
        chunks = [
            chunk
            for chunk in flight.batch.chunks
            if chunk.request in going_on and chunk.end + 1 < chunk.request.max_len
        ]
        batch = scheduler.plan_ahead(chunks)
        if batch is None:
            return None
        self.num_ahead += 1
        return self._launch(batch, flight)


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
