"""`python -m bench`: prefill and decode in turns with llama.cpp, beside what the machine allows."""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.ceilings import Ceilings, measure
from bench.engines import MissingError, Peer
from bench.engines.llama_cpp import LlamaCpp, requantised
from bench.engines.ours import Ours
from flexjudge_fast.cli import default_model

RESULTS = Path(__file__).parent / "results" / "latest.json"
Q4_0 = 2  # llama.cpp's LLAMA_FTYPE_MOSTLY_Q4_0


@dataclass(frozen=True)
class Row:
    """Tokens a second of one engine on one task: the median of the rounds, and their ends."""

    engine: str
    task: str
    median: float
    low: float
    high: float


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("--model", type=Path, default=None, help="a GGUF file; SmolLM2 if left out")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64, help="steps of decode")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8, 16])
    args = parser.parse_args()
    model = args.model or Path(default_model())
    console = Console()
    peers, missing = open_peers(model, args.threads)
    ceilings = measure(args.threads, model.stat().st_size)
    rows = in_turns(peers, args.prompt, args.batches, args.tokens, args.rounds)
    for reason in missing:
        console.print(f"[yellow]missing: {reason}")
    console.print(table(model.name, rows))
    report_ceilings(console, ceilings, model.stat().st_size)
    RESULTS.parent.mkdir(exist_ok=True)
    found = asdict(ceilings) if isinstance(ceilings, Ceilings) else ceilings
    results = {"model": model.name, "time": time.time(), "missing": missing, "ceilings": found}
    RESULTS.write_text(json.dumps({**results, "rows": [asdict(row) for row in rows]}, indent=1))
    console.print(f"written to {RESULTS}")


def open_peers(model: Path, threads: int) -> tuple[list[Peer], list[str]]:
    """The engines that load here, and why the others do not."""
    makers: list[Callable[[], Peer]] = [
        lambda: Ours(model, "int16", threads),
        lambda: Ours(model, "int8", threads),
        lambda: LlamaCpp(model, "the same file", threads),
        lambda: LlamaCpp(requantised(model, Q4_0, "Q4_0"), "requantised to Q4_0", threads),
    ]
    peers, missing = [], []
    for make in makers:
        try:
            peers.append(make())
        except MissingError as error:
            missing.append(str(error))
    return peers, missing


def in_turns(peers: list[Peer], prompt: int, batches: list[int], tokens: int, rounds: int) -> list[Row]:
    """Every engine does a task before any does the next, `rounds` times; an unmeasured round comes first."""
    tasks: dict[str, tuple[int, Callable[[Peer], float]]] = {
        f"prefill {prompt}": (prompt, lambda peer: peer.prefill(prompt))
    }
    for batch in batches:
        tasks[f"decode, batch {batch}"] = (batch * tokens, lambda peer, b=batch: peer.decode(b, tokens))
    rows = []
    for task, (count, run) in tasks.items():
        speeds: dict[str, list[float]] = {peer.name: [] for peer in peers}
        for turn in range(rounds + 1):
            for peer in peers:
                speed = count / run(peer)
                if turn:
                    speeds[peer.name].append(speed)
        rows += [Row(name, task, statistics.median(s), min(s), max(s)) for name, s in speeds.items()]
    return rows


def table(title: str, rows: list[Row]) -> Table:
    """Engines down, tasks across."""
    out = Table(title=f"{title}: tokens a second, median (lowest to highest)")
    tasks = list(dict.fromkeys(row.task for row in rows))
    for column in ("engine", *tasks):
        out.add_column(column, overflow="fold")
    for engine in dict.fromkeys(row.engine for row in rows):
        cells = {r.task: f"{r.median:.0f} ({r.low:.0f} to {r.high:.0f})" for r in rows if r.engine == engine}
        out.add_row(engine, *(cells[task] for task in tasks))
    return out


def report_ceilings(console: Console, ceilings: Ceilings | str, num_bytes: int) -> None:
    if isinstance(ceilings, str):
        console.print(f"[yellow]missing: the machine's ceilings ({ceilings})")
        return
    roofline = ceilings.read * 1e9 / num_bytes
    console.print(f"reads {ceilings.read:.1f} GB/s, byte products {ceilings.int8:.0f} GOP/s;", end=" ")
    console.print(f"reading the whole file once a token allows {roofline:.0f} tokens a second")


if __name__ == "__main__":
    main()
