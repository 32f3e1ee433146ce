"""Engines take turns: each does a task before any does it again; every round's figure is kept."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.engines import MissingError, Peer

_REST = 0.05  # seconds between turns, in which the last engine's idle threads stop spinning
_LEAST_STEPS = 8


@dataclass(frozen=True)
class Row:
    """One engine on one task: a sample per round, in `unit`; or why there is none."""

    part: str
    engine: str
    task: str
    unit: str = "tok/s"
    samples: tuple[float, ...] = ()
    missing: str | None = None
    note: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def low(self) -> float:
        return min(self.samples)

    @property
    def high(self) -> float:
        return max(self.samples)


@dataclass(frozen=True)
class Task:
    """`num_tokens` of a prompt (batch 0), or as many steps of `batch` sequences."""

    batch: int
    num_tokens: int

    @property
    def name(self) -> str:
        return f"decode, batch {self.batch}" if self.batch else f"prefill {self.num_tokens}"


Probe = Callable[[], float]


def open_all(makers: Sequence[tuple[str, Callable[[], Peer]]], part: str) -> tuple[list[Peer], list[Row]]:
    """The engines that load here, and a row that says why for each of the others."""
    peers, missing = [], []
    for name, make in makers:
        try:
            peers.append(make())
        except MissingError as error:
            missing.append(Row(part, name, "all", missing=str(error)))
    return peers, missing


def speed(peer: Peer, task: Task, steps: int) -> float:
    """Tokens a second of all sequences together."""
    if not task.batch:
        return task.num_tokens / peer.prefill(task.num_tokens)
    return task.batch * steps / peer.decode(task.batch, steps)


def in_turns(
    part: str,
    peers: Sequence[Peer],
    tasks: Sequence[Task],
    rounds: int,
    probes: dict[str, Probe],
    most_seconds: float,
) -> list[Row]:
    """Each task in `rounds` rounds, after one that warms up and is not counted.

    A decode that would take longer than `most_seconds` is cut to fewer steps, and its row says so.
    `probes` (name to what it measures, such as GB/s of reads) take their turn in every round, too.
    """
    rows = []
    for task in tasks:
        steps = {peer.name: _affordable(peer, task, most_seconds) for peer in peers}
        samples: dict[str, list[float]] = {name: [] for name in [*probes, *steps]}
        for _ in range(rounds):
            for name, probe in probes.items():
                samples[name].append(probe())
            for peer in peers:
                time.sleep(_REST)
                samples[peer.name].append(speed(peer, task, steps[peer.name]))
        rows += [Row(part, name, task.name, name.split()[-1], tuple(samples[name])) for name in probes]
        for peer in peers:
            cut = steps[peer.name] if task.batch and steps[peer.name] < task.num_tokens else 0
            note = f"{cut} steps" if cut else ""
            rows.append(Row(part, peer.name, task.name, samples=tuple(samples[peer.name]), note=note))
    return rows


def _affordable(peer: Peer, task: Task, most_seconds: float) -> int:
    """Steps that fit in `most_seconds`; the run that tells is the warm-up."""
    if not task.batch:
        peer.prefill(task.num_tokens)
        return task.num_tokens
    seconds = peer.decode(task.batch, _LEAST_STEPS) / _LEAST_STEPS
    return max(_LEAST_STEPS, min(task.num_tokens, int(most_seconds / seconds)))
