"""flexjudge_fast, through `Engine.generate`."""

import time
from pathlib import Path

from flexjudge_fast import Engine, SamplingParams


class Ours:
    def __init__(self, model: Path, activations: str, threads: int) -> None:
        self.name = f"ours, {activations}"
        self.engine = Engine.from_pretrained(
            model,
            max_model_len=2048,
            kv_cache_memory="1GiB",
            prefix_caching=False,
            activations=activations,
            num_threads=threads,
        )
        _ = (
            self.engine.provenance
        )  # the weights' hash is computed in the background: not beside the measurement

    def prefill(self, num_tokens: int) -> float:
        return self._generate([list(range(10, 10 + num_tokens))], 1)

    def decode(self, batch: int, num_tokens: int) -> float:
        prompts = [[i + 1, 2, 3] for i in range(batch)]
        return self._generate(prompts, num_tokens + 1) - self._generate(prompts, 1)

    def _generate(self, prompts: list[list[int]], num_tokens: int) -> float:
        params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
        start = time.perf_counter()
        self.engine.generate(prompts, params)
        return time.perf_counter() - start
