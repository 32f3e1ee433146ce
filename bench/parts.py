"""The models measured, the engines that measure them, and the tasks."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from bench.ceilings import MEMORY_BYTES, Ceilings
from bench.engines import MissingError, Peer
from bench.engines.hf import Transformers
from bench.engines.llama_cpp import Q4_0, SETTINGS, LlamaCpp, requantised
from bench.engines.openvino import OpenVino
from bench.engines.ours import Ours
from bench.models import ModelCost, model_cost
from bench.rounds import Probe, Row, Task, in_turns, open_all
from bench.seven_b import seven_b
from flexjudge_fast.cli import default_model

QWEN_15B = "qwen2.5-1.5b-q4_k_m.gguf"
READ, CACHED_READ, INT8 = (
    "ceiling: reads GB/s",
    "ceiling: reads of the model's size GB/s",
    "ceiling: int8 GOP/s",
)
ROOFLINE, CACHED_ROOFLINE = "roofline", "roofline, part of it in cache"
Makers = list[tuple[str, Callable[[], Peer]]]


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    threads: int = 2
    rounds: int = 3
    tokens: int = 128
    most_seconds: float = 3.0  # of one decode; slower engines decode fewer steps
    quick: bool = False


def find_model(name: str) -> Path:
    """A model of this file name, in the cache of models or in /work/models."""
    for folder in (Path.home() / ".cache" / "flexjudge" / "models", Path("/work/models")):
        if (folder / name).exists():
            return folder / name
    raise MissingError(f"{name} is not in ~/.cache/flexjudge/models")


def smollm2(plan: Plan) -> list[Row]:
    """SmolLM2-135M as shipped: prefill 512, decode 128 at batch 1, 4, 8 and 16."""
    model = Path(default_model())
    batches = [1, 8] if plan.quick else [1, 4, 8, 16]
    tasks = [Task(0, 512), *(Task(batch, plan.tokens) for batch in batches)]
    return measure("smollm2", model, _ours(model, plan) + _peers(model, plan), tasks, plan)


def qwen(plan: Plan) -> list[Row]:
    """Qwen2.5-1.5B Q4_K_M: prefill 256, decode at batch 1 and 8."""
    model = find_model(QWEN_15B)
    tasks = [Task(0, 256), Task(1, plan.tokens), Task(8, plan.tokens)]
    return measure("qwen", model, _ours(model, plan) + _peers(model, plan), tasks, plan)


def seven(plan: Plan) -> list[Row]:
    """The 7B shape. Our two settings do not fit in memory together: each takes turns with llama.cpp."""
    if plan.quick:
        raise MissingError("left out by --quick")
    model = seven_b(find_model(QWEN_15B))
    tasks = [Task(0, 128), Task(1, plan.tokens), Task(8, plan.tokens)]
    rows: list[Row] = []
    for mine in _ours(model, plan):
        label = f"beside {mine[0]}"
        makers: Makers = [mine, ("llama.cpp", partial(LlamaCpp, model, label, plan.threads, SETTINGS[:1]))]
        found = measure(
            "7b", model, makers, tasks, replace(plan, rounds=min(plan.rounds, 2), most_seconds=6.0)
        )
        rows += [replace(row, engine=_beside(row.engine, mine[0])) for row in found]
    reason = "not tried: this part is measured against llama.cpp alone, to leave memory for both"
    return rows + [Row("7b", name, "all", missing=reason) for name in ("transformers bf16", "OpenVINO GenAI")]


def _beside(engine: str, activations: str) -> str:
    is_engine = engine.startswith(("ours", "llama.cpp"))
    return engine if is_engine else f"{engine} (beside {activations})"


def _ours(model: Path, plan: Plan) -> Makers:
    return [
        ("ours, int16", lambda: Ours(model, "int16", plan.threads)),
        ("ours, int8", lambda: Ours(model, "int8", plan.threads)),
    ]


def _peers(model: Path, plan: Plan) -> Makers:
    threads = plan.threads
    return [
        ("llama.cpp, the same file", lambda: LlamaCpp(model, "the same file", threads)),
        ("llama.cpp, Q4_0", lambda: LlamaCpp(requantised(model, Q4_0, "Q4_0"), "Q4_0", threads)),
        ("OpenVINO GenAI, the same file", lambda: OpenVino(model, "the same file", threads)),
        ("OpenVINO GenAI, Q4_0", lambda: OpenVino(requantised(model, Q4_0, "Q4_0"), "Q4_0", threads)),
        ("transformers bf16", lambda: Transformers(model, threads)),
    ]


def measure(part: str, model: Path, makers: Makers, tasks: Sequence[Task], plan: Plan) -> list[Row]:
    """Every engine in turns, and the machine's ceilings between them."""
    cost = model_cost(model)
    peers, rows = open_all(makers, part)
    with ExitStack() as stack:
        for peer in peers:
            stack.callback(peer.close)
        try:
            ceilings = stack.enter_context(Ceilings(max(MEMORY_BYTES, cost.read_bytes)))
        except MissingError as error:
            rows.append(Row(part, ROOFLINE, "all", missing=str(error)))
            return rows + in_turns(part, peers, tasks, plan.rounds, {}, plan.most_seconds)
        probes, missing = _probes(part, ceilings, cost.read_bytes, plan.threads)
        rows += missing + in_turns(part, peers, tasks, plan.rounds, probes, plan.most_seconds)
    if INT8 in probes:
        for read, name in ((READ, ROOFLINE), (CACHED_READ, CACHED_ROOFLINE)):
            rows += _rooflines(rows, cost, tasks, read, name) if read in probes else []
    return rows


def _probes(
    part: str, ceilings: Ceilings, read_bytes: int, threads: int
) -> tuple[dict[str, Probe], list[Row]]:
    """The ceilings to measure in every round, and a row for each that cannot be.

    A model too small to be read from memory alone gets two rooflines: memory's, and that of reads of its own
    size, of which the last-level cache answers a part.
    """
    wanted: dict[str, Probe] = {
        READ: lambda: ceilings.measure("read", threads),
        INT8: lambda: ceilings.measure("int8", threads),
    }
    if read_bytes < MEMORY_BYTES:
        wanted[CACHED_READ] = lambda: ceilings.measure("read", threads, read_bytes)
    found, missing = {}, []
    for name, probe in wanted.items():
        try:
            probe()
            found[name] = probe
        except MissingError as error:
            missing.append(Row(part, name, "all", missing=str(error)))
    return found, missing


def _rooflines(
    rows: Sequence[Row], cost: ModelCost, tasks: Sequence[Task], read: str, name: str
) -> list[Row]:
    """What reads and byte products, as measured in the rounds of each task, allow."""
    out = []
    for task in tasks:
        reads, int8 = (next(r for r in rows if r.engine == n and r.task == task.name) for n in (read, INT8))
        pairs = zip(reads.samples, int8.samples, strict=True)
        count = task.batch or task.num_tokens
        samples = tuple(count / cost.seconds(task.batch, task.num_tokens, *pair) for pair in pairs)
        out.append(Row(reads.part, name, task.name, samples=samples))
    return out
