"""How long SmolLM2 takes from the call to its first token, from the .gguf and from a folder made of it."""

import tempfile
import time
from pathlib import Path

from bench.rounds import Row
from flexjudge_fast import Engine, SamplingParams
from flexjudge_fast.weights.checkpoint import open_checkpoint
from flexjudge_fast.weights.quantized_folder import write_folder

TASK, FOLDER = "load to the first token", "ours, the folder that `flexjudge quantize --to keep` writes"


def measure_loading(model: Path, threads: int, rounds: int) -> list[Row]:
    """Rounds in turns after one that is not counted, so that the files are in the page cache."""
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "kept"
        write_folder(open_checkpoint(model), folder, None)
        ways = {FOLDER: folder, "ours, the .gguf": model}
        samples: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds + 1):
            for name, path in ways.items():
                samples[name].append(_seconds(path, threads))
    return [Row("loading", name, TASK, "s", tuple(found[1:])) for name, found in samples.items()]


def _seconds(path: Path, threads: int) -> float:
    start = time.perf_counter()
    with Engine.from_pretrained(
        path, max_model_len=2048, kv_cache_memory="256MiB", num_threads=threads
    ) as engine:
        engine.generate(["The capital of France is"], SamplingParams(temperature=0, max_tokens=1))
        seconds = time.perf_counter() - start
        _ = engine.provenance  # waits for the weights' hash, so that it does not run into the next turn
        return seconds
