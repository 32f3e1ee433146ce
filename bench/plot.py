"""The plot of a run: what every engine reached of the machine's ceiling, task by task, and every op."""

from collections.abc import Sequence
from pathlib import Path

from bench.engines import MissingError
from bench.ops.rooflines import OpRow
from bench.rounds import Row

Share = tuple[str, str, float]  # place on the vertical axis, engine, share of the ceiling


def shares(rows: Sequence[Row]) -> list[Share]:
    """Medians over the roofline's median for the same task, measured in the same turns."""
    out = []
    for row in rows:
        if not row.samples or row.engine.startswith(("ceiling", "roofline")):
            continue
        others = [r for r in rows if (r.part, r.task) == (row.part, row.task) and r.samples]
        for roofline in others:
            beside = roofline.engine.removeprefix("roofline").removeprefix(" (beside ").removesuffix(")")
            if roofline.engine.startswith("roofline") and beside in row.engine:
                out.append((f"{row.part}: {row.task}", _short(row.engine), row.median / roofline.median))
    return out


def _short(engine: str) -> str:
    """Without its settings, and without the engine that it took turns with."""
    return engine.split(" (")[0].split(", beside")[0]


def op_shares(ops: Sequence[OpRow]) -> list[Share]:
    return [(row.name, "ours", row.roofline / row.median) for row in ops if row.samples and row.roofline]


def write_plot(path: Path, rows: Sequence[Row], ops: Sequence[OpRow]) -> None:
    """MissingError when matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise MissingError("matplotlib is not installed (pip install matplotlib)") from error
    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    panels = [(t, s) for t, s in (("engines", shares(rows)), ("ops", op_shares(ops))) if s]
    if not panels:
        raise MissingError("nothing was measured against a ceiling")
    places = [list(dict.fromkeys(place for place, _, _ in found)) for _, found in panels]
    figure = Figure(figsize=(8 * len(panels), 2 + 0.28 * max(map(len, places))), layout="constrained")
    for i, (title, found) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), i + 1)
        heights = {place: -at for at, place in enumerate(places[i])}
        for engine in dict.fromkeys(engine for _, engine, _ in found):
            points = [(share, heights[place]) for place, name, share in found if name == engine]
            marker = "o" if engine.startswith("ours") else "x"
            axes.plot(*zip(*points, strict=True), marker, label=engine)
        axes.set_yticks(list(heights.values()), list(heights), fontsize=8)
        axes.axvline(1.0, color="black", linewidth=1)
        axes.set_xlim(left=0)
        axes.grid(axis="both", alpha=0.3)
        axes.set_title(f"{title}: share of the machine's ceiling (reads, or byte products)")
        axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
