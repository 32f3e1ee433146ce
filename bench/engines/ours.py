"""flexjudge_fast, through `Engine.generate`."""

import time
from pathlib import Path

from bench.engines import prompt, short_prompts
from flexjudge_fast import Engine, SamplingParams


class Ours:
    """Everything a user's call costs is inside the times: scheduling, sampling, text."""

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
        _ = self.engine.provenance  # waits for the weights' hash: it is not computed beside a measurement

    def prefill(self, num_tokens: int) -> float:
        return self._generate([prompt(num_tokens)], 1)

    def decode(self, batch: int, num_tokens: int) -> float:
        prompts = short_prompts(batch)
        return self._generate(prompts, num_tokens + 1) - self._generate(prompts, 1)

    def close(self) -> None:
        self.engine.close()

    def _generate(self, prompts: list[list[int]], num_tokens: int) -> float:
        params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
        start = time.perf_counter()
        self.engine.generate(prompts, params)
        return time.perf_counter() - start
