"""`python bench/tune.py`: times tile sizes on this machine's GPU, as data for kernels/tile_tables.

Every trial is compiled first, side by side on all cores, then timed alone in a CUDA graph. One line of JSON
each: the table's section, the job, its tokens, the sizes that were tried and the microseconds.
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from bench.gpu import seconds  # noqa: E402
from flexjudge_fast.kernels import (  # noqa: E402
    attention_sizes,
    catalog_attention,
    catalog_linear,
    catalog_small,
    runs,
    tiles,
)
from flexjudge_fast.kernels.catalog import Launch, ModelShape  # noqa: E402
from flexjudge_fast.kernels.chips import arch_of, capability  # noqa: E402

Sizes = Mapping[str, int]
COLD_BYTES = 2e8  # of inputs that take turns: several times an L2 cache
PRODUCTS = {"linear": "bf16", "linear_w4a16": "w4a16-g128", "linear_int8": "int8", "linear_fp8": "fp8"}
MATRICES = ("qkv", "gate up", "down")
CACHES = {"bf16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
# How the reduction is cut: not at all, into runs one after the other, into runs side by side.
CUTS = {
    "whole": {"TARGET_PROGRAMS": 1},
    "serial": {"WORKSPACE_PERMILLE": 0},
    "parallel": {"WORKSPACE_PERMILLE": 10**6},
}


@dataclass(frozen=True)
class Trial:
    """sizes: by section of the tile tables, what is put over it."""

    job: str
    shape: ModelShape
    tokens: int
    sizes: tuple[tuple[str, tuple[tuple[str, int], ...]], ...]

    def launches(self, device: str) -> Iterator[Launch]:
        """The job's launch, over other memory each time."""
        matrices = catalog_linear.layer_matrices(self.shape)
        while True:
            if self.job in matrices:
                yield catalog_linear._product(self.shape, self.job, *matrices[self.job], self.tokens, device)
                continue
            part = catalog_attention if self.job in catalog_attention.CASES else catalog_small
            found = part.launches(self.shape, device)
            yield next(launch for launch in found if f"{launch.case},".startswith(f"{self.job},"))

    def line(self, micros: float) -> str:
        shape = {"weights": self.shape.weights, "kv": str(self.shape.kv_dtype)[6:]}
        sizes = {name: dict(sizes) for name, sizes in self.sizes}
        return json.dumps({"job": self.job, "tokens": self.tokens, **shape, "us": round(micros, 2), **sizes})


@contextlib.contextmanager
def laid_over(trial: Trial) -> Iterator[None]:
    """The tile tables with the trial's sizes over them."""
    choose, over = tiles._choose, {name: dict(sizes) for name, sizes in trial.sizes}
    tiles._choose = lambda kernel, case, arch: {**choose(kernel, case, arch), **over.get(kernel, {})}
    kept = (attention_sizes._sizes, runs._plan_runs)
    for found in kept:
        found.cache_clear()
    try:
        yield
    finally:
        tiles._choose = choose
        for found in kept:
            found.cache_clear()


def product_trials(names: Sequence[str]) -> Iterator[Trial]:
    for name, tokens, job in itertools.product(names, (16, 64, 128, 512, 2048), MATRICES):
        for cut, sizes in itertools.product(CUTS, tile_sizes(tokens)):
            if (job == "gate up" and cut != "whole") or (tokens == 2048 and cut == "parallel"):
                continue  # it is wide enough as it is
            over = (name, tuple({**CUTS[cut], **sizes, "maxnreg": 255}.items()))
            yield Trial(job, ModelShape(weights=PRODUCTS[name]), tokens, (over,))


def tile_sizes(tokens: int) -> Iterator[Sizes]:
    """BLOCK_N, BLOCK_T and warps that fit together, each with several depths of the pipeline."""
    if tokens <= 16:
        tiles, stages = [(64, 16, 4), (128, 16, 4), (128, 16, 8)], (4, 6, 8)
    elif tokens <= 64:
        tiles, stages = [(64, 32, 4), (64, 64, 4), (128, 32, 8), (128, 64, 4), (128, 64, 8)], (3, 4, 6)
    elif tokens <= 128:
        tiles, stages = [(64, 64, 4), (64, 128, 4), (128, 64, 4), (128, 64, 8), (128, 128, 8)], (3, 4)
    else:
        tiles = [(64, 128, 4), (128, 64, 4), (128, 128, 8), (128, 128, 4), (128, 256, 8), (256, 128, 8)]
        stages = (2, 3, 4)
    for (rows, across, warps), depth in itertools.product(tiles, stages):
        yield {"BLOCK_N": rows, "BLOCK_T": across, "num_warps": warps, "num_stages": depth}


def attention_trials() -> Iterator[Trial]:
    for name, job in itertools.product(CACHES, catalog_attention.CASES):
        part = "prefill" if job.startswith("prefill") else "shared" if "shared" in job else "decode"
        shapes = [(64, 4)] if part == "decode" else [(64, 4), (128, 8)]
        widen = (0,) if name == "bf16" else (0, 1)
        for block_n, wide, depth, (rows, warps) in itertools.product((32, 64, 128), widen, (2, 3, 4), shapes):
            over = (
                ("attention", (("BLOCK_N", block_n), ("WIDEN_FIRST", wide))),
                (f"attention_{part}", (("num_stages", depth), ("BLOCK_M", rows), ("num_warps", warps))),
            )
            yield Trial(job, ModelShape(kv_dtype=CACHES[name]), 0, over)


def segment_trials() -> Iterator[Trial]:
    """Of the vision tower. What windows and frames have in common, BLOCK_N, is tried with both."""
    shapes = [(64, 4, 128), (128, 8, 128), (128, 8, 255), (64, 4, 255)]
    for block_n, depth in itertools.product((64, 128), (1, 2, 3)):
        over = {"BLOCK_N": block_n, "num_stages": depth}
        yield Trial("windows of 64", ModelShape(), 0, (("segment_attention", tuple(over.items())),))
        for rows, warps, registers in shapes:
            long = over | {"BLOCK_M": rows, "num_warps": warps, "maxnreg": registers}
            yield Trial("frames of 1024", ModelShape(), 0, (("segment_attention", tuple(long.items())),))


def compile_trial(trial: Trial, cache: str) -> str:
    """What is wrong with the trial, or nothing."""
    from flexjudge_fast.kernels.aot.offline_driver import compiling_for

    arch = arch_of(int(os.environ["ARCH"]))
    try:
        with compiling_for(arch, Path(cache)), laid_over(trial):
            next(trial.launches("meta")).run()
    except Exception as error:  # whatever a compiler raises, this trial is out
        return f"{type(error).__name__}: {str(error)[:200]}"
    return ""


def time_trial(trial: Trial, calls: dict[object, list[Launch]]) -> float:
    """Microseconds; NaN if the device cannot run it. calls: kept for the next trial of the same job."""
    plans = trial.sizes if trial.job in catalog_attention.CASES else ()  # they depend on the sizes
    key = (trial.job, trial.shape, trial.tokens, plans)
    try:
        with laid_over(trial):
            if key not in calls:
                calls.clear()
                first = next(trial.launches("cuda"))
                copies = min(32, math.ceil(COLD_BYTES / first.num_bytes))
                calls[key] = [first, *itertools.islice(trial.launches("cuda"), copies)]
            return 1e6 * seconds([launch.run for launch in calls[key]])
    except Exception as error:  # out of registers or shared memory
        print(trial.line(math.nan), str(error)[:100], flush=True)
        return math.nan


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=(*PRODUCTS, "attention", "segments"), action="append")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "tune.jsonl")
    chosen = parser.parse_args()
    only = chosen.only or (*PRODUCTS, "attention", "segments")
    trials = list(product_trials([name for name in PRODUCTS if name in only]))
    trials += list(attention_trials()) if "attention" in only else []
    trials += list(segment_trials()) if "segments" in only else []
    os.environ["ARCH"] = str(capability())
    cache = os.environ.setdefault("TRITON_CACHE_DIR", str(Path.home() / ".triton" / "cache"))
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        faults = list(pool.map(compile_trial, trials, itertools.repeat(cache), chunksize=4))
    print(f"{len(trials)} trials, {sum(map(bool, faults))} do not compile", flush=True)
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    calls: dict[object, list[Launch]] = {}
    with chosen.out.open("w", encoding="utf-8") as out:
        for trial, fault in zip(trials, faults, strict=True):
            micros = math.nan if fault else time_trial(trial, calls)
            print(trial.line(micros), file=out, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
