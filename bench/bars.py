"""The bars: ratios of medians of one run, and whether they are met."""

from collections.abc import Sequence
from dataclasses import dataclass

from bench.loading import FOLDER, TASK
from bench.rounds import Row

SETTINGS = ("int16", "int8")  # ours: 16-bit activations (the default) and 8-bit


@dataclass(frozen=True)
class Bar:
    """`found` is `None` where something it needs was not measured."""

    name: str
    setting: str
    wanted: float
    found: float | None

    @property
    def met(self) -> bool | None:
        return None if self.found is None else self.found >= self.wanted


class Medians:
    """Looks medians up in rows; `None` for what was not measured."""

    def __init__(self, rows: Sequence[Row], part: str) -> None:
        self._rows = [row for row in rows if row.part == part and row.samples]

    def of(self, engine: str, task: str) -> float | None:
        """The engine of this name, or the first whose name begins so."""
        found = [r for r in self._rows if r.engine.startswith(engine) and r.task == task]
        return min(found, key=lambda row: row.engine != engine).median if found else None

    def fastest_peer(self, task: str) -> float | None:
        own = ("ours", "ceiling", "roofline")
        found = [r.median for r in self._rows if r.task == task and not r.engine.startswith(own)]
        return max(found, default=None)


def _ratio(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a / b


def all_bars(rows: Sequence[Row]) -> list[Bar]:
    """Every bar, for each of our settings."""
    return [bar for setting in SETTINGS for bar in _bars(rows, setting)]


def _bars(rows: Sequence[Row], setting: str) -> list[Bar]:
    ours = f"ours, {setting}"
    out: list[Bar] = []

    def bar(name: str, wanted: float, a: float | None, b: float | None) -> None:
        out.append(Bar(name, setting, wanted, _ratio(a, b)))

    one, eight = "decode, batch 1", "decode, batch 8"
    small = Medians(rows, "smollm2")
    for label in ("the same file", "Q4_0"):
        bar(
            f"SmolLM2 decode: llama.cpp, {label}",
            2.0,
            small.of(ours, one),
            small.of(f"llama.cpp, {label}", one),
        )
    bar("SmolLM2 decode: share of the read roofline", 0.7, small.of(ours, one), small.of("roofline", one))
    cached = small.of("roofline, part of it in cache", one)
    bar("SmolLM2 decode: the same, part of it in cache", 0.7, small.of(ours, one), cached)
    bar("SmolLM2 batch 8: our own batch 1", 4.0, small.of(ours, eight), small.of(ours, one))
    for label in ("the same file", "Q4_0"):
        peer = small.of(f"llama.cpp, {label}", eight)
        bar(f"SmolLM2 batch 8: llama.cpp, {label}", 2.0, small.of(ours, eight), peer)
    prompt = small.of(ours, "prefill 512")
    bar("SmolLM2 prefill: transformers bf16", 1.5, prompt, small.of("transformers", "prefill 512"))
    bar("SmolLM2 prefill: llama.cpp, Q4_0", 2.0, prompt, small.of("llama.cpp, Q4_0", "prefill 512"))
    bar("SmolLM2 prefill: the fastest peer", 1.0, prompt, small.fastest_peer("prefill 512"))

    seconds = Medians(rows, "loading").of(FOLDER, TASK)
    bar("SmolLM2 from a quantised folder: 1 s over load to the first token", 1.0, 1.0, seconds)

    large, same = Medians(rows, "qwen"), "llama.cpp, the same file"
    bar("1.5B decode: share of the read roofline", 0.88, large.of(ours, one), large.of("roofline", one))
    bar("1.5B decode: llama.cpp", 1.15, large.of(ours, one), large.of(same, one))
    bar("1.5B prefill: llama.cpp", 2.0, large.of(ours, "prefill 256"), large.of(same, "prefill 256"))
    bar("1.5B batch 8: llama.cpp", 2.5, large.of(ours, eight), large.of(same, eight))

    seven, beside = Medians(rows, "7b"), f"llama.cpp, beside {ours}"
    bar(
        "7B decode: share of the read roofline",
        0.85,
        seven.of(ours, one),
        seven.of(f"roofline (beside {ours})", one),
    )
    bar("7B decode: llama.cpp", 1.0, seven.of(ours, one), seven.of(beside, one))
    bar("7B prefill: llama.cpp", 2.0, seven.of(ours, "prefill 128"), seven.of(beside, "prefill 128"))
    bar("7B batch 8: our own batch 1", 5.0, seven.of(ours, eight), seven.of(ours, one))

    if setting == SETTINGS[0]:  # a tower's weights are plain: both settings are the same
        eye, image = Medians(rows, "vision"), "encode 448x448"
        peak = eye.of("ceiling: bf16", image) or eye.of("ceiling: fp32", image)
        ear, sound = Medians(rows, "hearing"), "encode 10 s of sound"
        bar("audio tower: transformers bf16", 1.5, ear.of("transformers", sound), ear.of("ours", sound))
        bar("vision tower: transformers bf16", 1.5, eye.of("ours", image), eye.of("transformers", image))
        bar("vision tower: share of the bf16 peak (fp32 without bf16)", 0.6, eye.of("ours", image), peak)

    for part, label in (("judge smollm2", "SmolLM2"), ("judge qwen", "1.5B")):
        judge = Medians(rows, part)
        mine, alone = (
            judge.of(ours, "the judge's work"),
            judge.of("llama.cpp, vote by vote", "the judge's work"),
        )
        bar(f"the judge's work, {label}: llama.cpp vote by vote", 5.0, mine, alone)
    return out
