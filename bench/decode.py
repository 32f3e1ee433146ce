"""Prefill and decode speed: `python bench/decode.py [MODEL] [int16|int8]`, default SmolLM2 with int16."""

import sys
import time

from flexjudge_fast import Engine, SamplingParams
from flexjudge_fast.cli import default_model

PROMPT, TOKENS = 512, 64


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else default_model()
    activations = sys.argv[2] if len(sys.argv) > 2 else "int16"
    engine = Engine.from_pretrained(
        model, max_model_len=2048, kv_cache_memory="1GiB", prefix_caching=False, activations=activations
    )
    _ = engine.provenance  # the weights' hash is computed in the background: not beside the measurement
    first = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    engine.generate([[1, 2, 3]], params)
    start = time.perf_counter()
    engine.generate([list(range(10, 10 + PROMPT))], first)
    print(f"prefill {PROMPT}: {PROMPT / (time.perf_counter() - start):.0f} tok/s")
    for batch in (1, 4, 8, 16):
        prompts = [[i + 1, 2, 3] for i in range(batch)]
        start = time.perf_counter()
        engine.generate(prompts, params)
        print(f"decode, batch {batch}: {batch * TOKENS / (time.perf_counter() - start):.1f} tok/s in total")


if __name__ == "__main__":
    main()
