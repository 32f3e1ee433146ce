"""`python -m bench`: every part in one run; a table, JSON and a plot of what was found."""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console

from bench.bars import all_bars
from bench.ceilings import KINDS, MEMORY_BYTES, Ceilings
from bench.engines import MissingError
from bench.engines.llama_cpp import Q4_0, requantised
from bench.judge_work import Work, measure_judge
from bench.loading import measure_loading
from bench.ops.rooflines import OpRow, measure_ops
from bench.parts import QWEN_15B, Plan, find_model, qwen, seven, smollm2
from bench.plot import write_plot
from bench.report import as_json, show_bars, show_ops, show_rows, write_json
from bench.rounds import Row
from bench.vision import measure_encoding, measure_hearing, measure_judging
from flexjudge_fast.cli import default_model

RESULTS = Path(__file__).parent / "results"


@dataclass
class Found:
    """What the parts have measured so far."""

    rows: list[Row] = field(default_factory=list)
    ops: list[OpRow] = field(default_factory=list)


def ceilings(plan: Plan) -> list[Row]:
    """Reads of 1 GiB on one thread and on all, and the peaks of arithmetic."""
    found: dict[tuple[str, int], list[float]] = {}
    rows = []
    with Ceilings(MEMORY_BYTES) as machine:
        wanted = [("read", 1), *((kind, plan.threads) for kind in KINDS)]
        for _ in range(plan.rounds + 2):
            for kind, threads in list(wanted):
                try:
                    found.setdefault((kind, threads), []).append(machine.measure(kind, threads))
                except MissingError as error:
                    wanted.remove((kind, threads))
                    rows.append(Row("ceilings", kind, f"{threads} threads", missing=str(error)))
    for (kind, threads), samples in found.items():
        if samples:
            name = f"ceiling: {kind} {KINDS[kind]}"
            rows.append(Row("ceilings", name, f"{threads} threads", KINDS[kind], tuple(samples)))
    return rows


def judge_small(plan: Plan) -> list[Row]:
    model = Path(default_model())
    requantised_model = requantised(model, Q4_0, "Q4_0")
    peers = [
        (model, "the same file", False),
        (model, "the same file", True),
        (requantised_model, "Q4_0", False),
        (requantised_model, "Q4_0", True),
    ]
    work = Work(pairs=8, think_tokens=16, peer_pairs=2) if plan.quick else Work()
    return measure_judge("judge smollm2", model, peers, plan.threads, min(plan.rounds, 3), work)


def judge_large(plan: Plan) -> list[Row]:
    """One round: ours alone takes minutes over the 32 pairs."""
    if plan.quick:
        raise MissingError("left out by --quick")
    model = find_model(QWEN_15B)
    peers = [(model, "the same file", False), (model, "the same file", True)]
    return measure_judge("judge qwen", model, peers, plan.threads, 1, Work(think_tokens=16, peer_pairs=2))


def loading(plan: Plan) -> list[Row]:
    return measure_loading(Path(default_model()), plan.threads, plan.rounds)


def vision(plan: Plan) -> list[Row]:
    """One round: transformers takes minutes for an image where the processor has no bfloat16."""
    if plan.quick:
        raise MissingError("left out by --quick")
    return measure_encoding(plan.threads, 1)


def judge_vision(plan: Plan) -> list[Row]:
    return measure_judging(plan.threads, min(plan.rounds, 3))


def hearing(plan: Plan) -> list[Row]:
    if plan.quick:
        raise MissingError("left out by --quick")
    return measure_hearing(plan.threads, 1)


PARTS: dict[str, Callable[[Plan], list[Row]]] = {
    "ceilings": ceilings,
    "loading": loading,
    "smollm2": smollm2,
    "judge-smollm2": judge_small,
    "qwen": qwen,
    "7b": seven,
    "judge-qwen": judge_large,
    "vision": vision,
    "judge-vision": judge_vision,
    "hearing": hearing,
}


def main() -> None:
    names = [*PARTS, "ops"]
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--only", default=",".join(names), help=f"parts, of {','.join(names)}")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=128, help="steps of decode")
    parser.add_argument(
        "--quick", action="store_true", help="two rounds, fewer steps, no 7B: under 5 minutes"
    )
    parser.add_argument("--json", type=Path, default=RESULTS / "latest.json")
    parser.add_argument("--plot", type=Path, default=RESULTS / "latest.png")
    args = parser.parse_args()
    wanted = args.only.split(",")
    if unknown := [name for name in wanted if name not in names]:
        parser.error(f"--only: {unknown[0]} is none of {', '.join(names)}")
    plan = Plan(args.threads, args.rounds, args.tokens)
    if args.quick:
        plan = Plan(args.threads, 2, 32, most_seconds=1.0, quick=True)
    console = Console() if sys.stdout.isatty() else Console(width=160)
    found = Found()
    for name in wanted:
        start = time.perf_counter()
        _run_part(name, plan, found, console)
        console.print(f"[dim]{name}: {time.perf_counter() - start:.0f} s")
        bars = all_bars(found.rows)  # written after each part, so that an interrupted run keeps its figures
        settings = json.loads(json.dumps({"plan": asdict(plan), "parts": wanted}))
        write_json(args.json, as_json(found.rows, found.ops, bars, settings))
    show_bars(console, bars)
    try:
        write_plot(args.plot, found.rows, found.ops)
        console.print(f"plot: {args.plot}")
    except MissingError as error:
        console.print(f"[yellow]plot: missing: {error}")
    console.print(f"JSON: {args.json}")


def _run_part(name: str, plan: Plan, found: Found, console: Console) -> None:
    """Measure one part and show it; a part that cannot run is a row that says why."""
    if name == "ops":
        found.ops += measure_ops(plan.threads, plan.rounds, plan.quick)
        show_ops(console, found.ops)
        return
    try:
        rows = PARTS[name](plan)
    except MissingError as error:
        rows = [Row(name.replace("-", " "), "all engines", "all", missing=str(error))]
    show_rows(console, rows)
    found.rows += rows


if __name__ == "__main__":
    main()
