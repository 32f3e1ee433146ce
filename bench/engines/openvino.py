"""OpenVINO GenAI, which reads a GGUF file into its own 4-bit graph."""

import time
from pathlib import Path
from typing import Any

import numpy as np

from bench.engines import MissingError, prompt, short_prompts


class OpenVino:
    """`LLMPipeline` on the CPU, its prefix cache off, greedy."""

    def __init__(self, model: Path, label: str, threads: int) -> None:
        try:
            import openvino
            import openvino_genai
        except ImportError as error:
            raise MissingError("openvino-genai is not installed (pip install openvino-genai)") from error
        self.name = f"OpenVINO GenAI, {label}"
        self._openvino, self._genai = openvino, openvino_genai
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False
        scheduler.cache_size = 1  # GB
        scheduler.max_num_batched_tokens = 1024
        try:
            self._pipe: Any = openvino_genai.LLMPipeline(
                str(model),
                "CPU",
                INFERENCE_NUM_THREADS=threads,
                ATTENTION_BACKEND="PA",  # paged attention; its other one, SDPA, was no faster
                scheduler_config=scheduler,
            )
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise MissingError(f"{self.name} cannot load {model.name}: {reason}") from error

    def prefill(self, num_tokens: int) -> float:
        return self._generate([prompt(num_tokens)], 1)

    def decode(self, batch: int, num_tokens: int) -> float:
        prompts = short_prompts(batch)
        return self._generate(prompts, num_tokens + 1) - self._generate(prompts, 1)

    def close(self) -> None:
        self._pipe = None

    def _generate(self, prompts: list[list[int]], num_tokens: int) -> float:
        ids = np.array(prompts, dtype=np.int64)
        tensor = self._openvino.Tensor
        inputs = self._genai.TokenizedInputs(tensor(ids), tensor(np.ones_like(ids)))
        config = self._genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = num_tokens, True, False
        start = time.perf_counter()
        found = self._pipe.generate(inputs, config)
        seconds = time.perf_counter() - start
        if any(len(tokens) != num_tokens for tokens in found.tokens):
            raise RuntimeError(f"{self.name} stopped before {num_tokens} tokens")
        return seconds
