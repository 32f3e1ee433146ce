"""Tables for the terminal, and the JSON of a run."""

import json
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import rich.box
from rich.console import Console
from rich.table import Table

from bench.bars import Bar
from bench.ops.rooflines import OpRow
from bench.rounds import Row


def show_rows(console: Console, rows: Sequence[Row]) -> None:
    """One table a part: engines down, tasks across; ratios are ours (int16; int8) to that engine."""
    for part in dict.fromkeys(row.part for row in rows):
        found = [row for row in rows if row.part == part]
        tasks = list(dict.fromkeys(row.task for row in found if row.samples))
        table = Table(title=f"{part}: median (lowest to highest)", box=rich.box.SIMPLE_HEAD)
        for column in ("engine", *tasks):
            table.add_column(column, overflow="fold")
        for engine in dict.fromkeys(row.engine for row in found if row.samples):
            table.add_row(engine, *(_cell(found, engine, task) for task in tasks))
        if tasks:
            console.print(table)
        for row in found:
            if row.missing is not None:
                console.print(f"[yellow]{part}: {row.engine}: missing: {row.missing}")


def _cell(rows: Sequence[Row], engine: str, task: str) -> str:
    row = next((r for r in rows if r.engine == engine and r.task == task and r.samples), None)
    if row is None:
        return ""
    text = f"{_number(row.median)} ({_number(row.low)} to {_number(row.high)})"
    if row.unit not in ("GB/s", "GOP/s", "GFLOP/s") and not engine.startswith(
        ("ours", "ceiling", "roofline")
    ):
        mine = [r for r in rows if r.task == task and r.engine.startswith("ours") and r.samples]
        if engine_beside := next((r for r in mine if r.engine in engine), None):
            mine = [engine_beside]
        if mine:
            text += "\nours " + ", ".join(f"{_times_as_good(r, row):.2f}x" for r in mine)
    return text + (f"\n{row.note}" if row.note else "")


def _times_as_good(ours: Row, theirs: Row) -> float:
    """Of speeds, how many times as fast; of times, how many times as short."""
    is_time = ours.unit.split()[0] in ("s", "ms")
    return theirs.median / ours.median if is_time else ours.median / theirs.median


def _number(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def show_ops(console: Console, rows: Sequence[OpRow]) -> None:
    """One line an op: time, what it reached of its roofline, and how torch compares."""
    table = Table(title="ops: median (lowest to highest)", box=rich.box.SIMPLE_HEAD)
    for column in ("op", "us", "bound", "of the roofline", "torch fp32", "torch bf16"):
        table.add_column(column)
    for row in rows:
        if row.missing is not None:
            table.add_row(row.name, f"missing: {row.missing}")
            continue
        share = "missing" if row.roofline is None else f"{100 * row.roofline / row.median:.0f}%"
        ratios = [
            f"{row.torch[kind] / row.median:.2f}x" if kind in row.torch else "" for kind in ("fp32", "bf16")
        ]
        spread = f"{1e6 * row.median:.0f} ({1e6 * row.low:.0f} to {1e6 * row.high:.0f})"
        table.add_row(row.name, spread, row.bound, share, *ratios)
    console.print(table)


def show_bars(console: Console, bars: Sequence[Bar]) -> None:
    """Each bar once, with what either setting found."""
    table = Table(title="bars: ratios of medians of this run", box=rich.box.SIMPLE_HEAD)
    for column in ("bar", "at least", "int16", "int8"):
        table.add_column(column)
    for name in dict.fromkeys(bar.name for bar in bars):
        both = [bar for bar in bars if bar.name == name]
        table.add_row(name, f"{both[0].wanted:g}", *map(_verdict, both))
    console.print(table)


def _verdict(bar: Bar) -> str:
    if bar.found is None:
        return "[yellow]not measured"
    return f"[green]{bar.found:.2f} met" if bar.met else f"[red]{bar.found:.2f} not met"


def as_json(
    rows: Sequence[Row], ops: Sequence[OpRow], bars: Sequence[Bar], settings: dict[str, Any]
) -> dict[str, Any]:
    """Everything a run found."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "machine": {"processor": _processor(), "system": platform.platform()},
        "settings": settings,
        "rows": [asdict(row) | ({"median": row.median} if row.samples else {}) for row in rows],
        "ops": [asdict(row) for row in ops],
        "bars": [asdict(bar) | {"met": bar.met} for bar in bars],
    }


def write_json(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1))


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
