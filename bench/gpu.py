"""`python bench/gpu.py`: the one command for a machine with a GPU: checks every kernel, times it, and judges.

1. The `gpu` tests: every kernel against float64 in bfloat16, graphs against eager steps.
2. Each launch of a 7B judge, in a CUDA graph, beside what this card's measured bandwidth and arithmetic
   allow, and beside torch (and flash-attn where it is installed) doing the same job.
3. A random model of the 7B's shape: prefill, decode, and the judge's work, beside vLLM where it is installed.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from bench.engines import MissingError  # noqa: E402
from bench.gpu_engines import Vllm, measure_engine, measure_judging  # noqa: E402
from bench.gpu_peers import peers  # noqa: E402
from flexjudge_fast.kernels.catalog import ModelShape, launches  # noqa: E402
from flexjudge_fast.kernels.chips import arch_of, capability  # noqa: E402

WEIGHTS = ("bf16", "w4a16-g128", "int8", "fp8")
KV_DTYPES = (torch.bfloat16, torch.int8, torch.float8_e4m3fn)
JUDGING = (64, 256)  # sequences at once
COPIES = 8  # of a launch's memory, which take turns


@dataclass(frozen=True)
class KernelRow:
    """One launch: microseconds taken, the least this card allows, and others' for the same job."""

    kernel: str
    case: str
    tokens: int
    micros: float
    bound: float
    peers: dict[str, float]


@dataclass(frozen=True)
class Ceilings:
    """What this card was seen to do: bytes and operations per second."""

    bandwidth: float
    bf16_flops: float


def seconds(calls: Sequence[Callable[[], object]]) -> float:
    """Of one of `calls`, which do the same over other memory: by the median replay of a CUDA graph of all."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    rounds = math.ceil(8 / len(calls))
    with torch.cuda.graph(graph):
        for call in list(calls) * rounds:
            call()
    graph.replay()
    found = []
    for _ in range(15):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end))
    return statistics.median(found) / 1e3 / len(calls) / rounds


def ceilings() -> Ceilings:
    """A copy of 1 GiB, and a product of 8192 x 8192."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copying = seconds([lambda: target.copy_(source)])
    x = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    multiplying = seconds([lambda: x @ x])
    return Ceilings(2 * source.nbytes / copying, 2 * 8192**3 / multiplying)


def measure_kernels(card: Ceilings) -> Iterator[KernelRow]:
    """Every launch of the catalog once, whatever shape lists it first."""
    arch = arch_of(capability())
    shapes = [ModelShape(weights=weights) for weights in WEIGHTS]
    shapes += [ModelShape(kv_dtype=kv_dtype) for kv_dtype in KV_DTYPES]
    done: set[tuple[str, str, int]] = set()
    for shape in shapes:
        copies = [launches(shape, "cuda") for _ in range(COPIES)]
        for same in zip(*copies, strict=True):
            launch = same[0]
            key = (launch.kernel, launch.case, launch.tokens)
            if key in done or (launch.needs and launch.needs not in arch.features):
                continue
            done.add(key)
            bound = max(launch.num_bytes / card.bandwidth, launch.flops / card.bf16_flops)
            others = [peers(launch, shape) for _ in range(COPIES)]
            times = {name: 1e6 * seconds([calls[name] for calls in others]) for name in others[0]}
            yield KernelRow(*key, 1e6 * seconds([each.run for each in same]), 1e6 * bound, times)


def show_kernels(rows: list[KernelRow]) -> None:
    """A line each: how close to the bound, and how many times as fast as each peer."""
    print(f"\n{'kernel':24} {'case':34} {'tokens':>6} {'us':>9} {'bound us':>9} {'of bound':>8}  peers")
    for row in rows:
        others = ", ".join(f"{name} {micros / row.micros:.2f}x" for name, micros in row.peers.items())
        times = f"{row.micros:9.1f} {row.bound:9.1f} {row.bound / row.micros:8.0%}"
        print(f"{row.kernel:24} {row.case:34} {row.tokens:6} {times}  {others}")


def run_tests() -> str:
    """The last line that pytest prints of the `gpu` tests."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout[-6000:], done.stderr[-2000:], sep="\n")
    return (done.stdout.strip() or done.stderr.strip()).splitlines()[-1]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=("tests", "kernels", "engine"), action="append")
    parser.add_argument("--layers", type=int, default=28, help="of the random model; fewer for a small card")
    parser.add_argument("--model", type=Path, help="a checkpoint instead of the random one")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "gpu.json")
    chosen = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no CUDA device here: `make kernels` is what can be proven without one", file=sys.stderr)
        return 2
    parts = chosen.only or ("tests", "kernels", "engine")
    device = torch.cuda.get_device_properties(0)
    found: dict[str, object] = {"device": device.name, "torch": torch.__version__}
    print(f"{device.name}, {device.total_memory / 2**30:.0f} GiB, torch {torch.__version__}")
    if "tests" in parts:
        found["tests"] = run_tests()
        print(f"gpu tests: {found['tests']}")
    if "kernels" in parts:
        card = ceilings()
        print(f"measured: {card.bandwidth / 1e9:.0f} GB/s, {card.bf16_flops / 1e12:.0f} TFLOP/s in bfloat16")
        rows = list(measure_kernels(card))
        show_kernels(rows)
        found |= {"ceilings": asdict(card), "kernels": [asdict(row) for row in rows]}
    if "engine" in parts:
        with tempfile.TemporaryDirectory() as work:
            found["engine"] = _engines(chosen.model, chosen.layers, Path(work))
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"\n{chosen.out}")
    return 0


def _engines(model: Path | None, layers: int, work: Path) -> dict[str, dict[str, float] | str]:
    """Tokens a second of each engine by task, or why there is none."""
    from bench.gpu_engines import random_model

    folder = model or random_model(work / "7b", layers)
    ours = measure_engine(folder)
    for num_seqs in JUDGING:
        ours |= measure_judging(folder, num_seqs)
    found: dict[str, dict[str, float] | str] = {"ours": ours}
    try:
        found["vllm"] = Vllm(folder).measure()
    except MissingError as error:
        found["vllm"] = str(error)
    for name, speeds in found.items():
        print(f"{name}: {speeds}")
    return found


if __name__ == "__main__":
    sys.exit(main())
