"""Each op against the least time its bytes and operations take on this machine, and against torch."""

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby

import torch

from bench.ceilings import Ceilings
from bench.engines import MissingError
from bench.ops.cases import WORKING_SET, Call, OpCase, all_cases

_SECONDS = 0.06  # of one sample: as many calls as fit


@dataclass(frozen=True)
class OpRow:
    """Seconds of one call: a sample per round. `roofline` is the least time, set by `bound`."""

    name: str
    samples: tuple[float, ...] = ()
    roofline: float | None = None
    bound: str = ""
    torch: dict[str, float] = field(default_factory=dict)
    missing: str | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def low(self) -> float:
        return min(self.samples)

    @property
    def high(self) -> float:
        return max(self.samples)


def measure_ops(threads: int, rounds: int, quick: bool) -> list[OpRow]:
    """Every case in turns with torch and with the ceilings. `quick`: Q4_0, Q4_K and BF16 only."""
    torch.set_num_threads(threads)
    try:
        ceilings: Ceilings | None = Ceilings(WORKING_SET)
    except MissingError:
        ceilings = None
    try:
        cases = all_cases(threads)
        kept = (case for case in cases if not quick or not _left_out(case))
        groups = groupby(kept, key=lambda case: case.name.split(", ")[0])
        return [row for _, group in groups for row in _measure(group, threads, rounds, ceilings)]
    except MissingError as error:
        return [OpRow("all ops", missing=str(error))]
    finally:
        if ceilings is not None:
            ceilings.close()


def _left_out(case: OpCase) -> bool:
    return case.name.startswith("linear") and not case.name.startswith(
        ("linear Q4_0", "linear Q4_K", "linear BF16")
    )


def _measure(
    group: Iterator[OpCase], threads: int, rounds: int, ceilings: Ceilings | None
) -> Iterator[OpRow]:
    """Cases that share their data, in turns with torch; the ceilings are measured in each round."""
    for case in group:
        own: list[float] = []
        peers: dict[str, list[float]] = {kind: [] for kind in case.torch}
        limits: dict[str, list[float]] = {"read": [], case.peak: []}
        for turn in range(rounds + 1):
            found = {kind: _seconds(call) for kind, call in case.torch.items()}
            time.sleep(0.02)  # torch's threads spin for a while
            mine = _seconds(case.call)
            if turn == 0:
                continue
            own.append(mine)
            for kind, seconds in found.items():
                peers[kind].append(seconds)
            for kind in limits if ceilings is not None else ():
                try:
                    assert ceilings is not None
                    limits[kind].append(ceilings.measure(kind, threads))
                except MissingError:
                    pass  # the row's roofline says "missing"
        roofline, bound = _roofline(case, limits)
        yield OpRow(
            case.name, tuple(own), roofline, bound, {k: statistics.median(v) for k, v in peers.items()}
        )


def _roofline(case: OpCase, limits: dict[str, list[float]]) -> tuple[float | None, str]:
    if not all(limits.values()):
        return None, ""
    read = case.read_bytes / statistics.median(limits["read"]) * 1e-9
    work = case.operations / max(limits[case.peak]) * 1e-9  # other programs can only lower a peak
    return (read, "reads") if read >= work else (work, case.peak)


def _seconds(call: Call) -> float:
    """Mean seconds of a call, over as many as fill a sample."""
    start = time.perf_counter()
    call()
    first = time.perf_counter() - start
    count = max(1, int(_SECONDS / first))
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count
