"""The same two figures for llama.cpp: `python bench/llama_cpp_peer.py [MODEL]` (needs llama-cpp-python)."""

import sys
import time

from llama_cpp import Llama

from flexjudge_fast.cli import default_model

PROMPT, TOKENS, THREADS = 512, 64, 2


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else str(default_model())
    llama = Llama(model, n_ctx=1024, n_batch=512, n_threads=THREADS, n_threads_batch=THREADS, verbose=False)
    for _ in range(2):  # the first round warms up
        llama.reset()
        start = time.perf_counter()
        llama.eval(list(range(10, 10 + PROMPT)))
        prefill = time.perf_counter() - start
        llama.reset()
        llama.eval([1, 2, 3])
        start = time.perf_counter()
        for token in range(TOKENS):
            llama.eval([token + 10])
        decode = time.perf_counter() - start
    print(f"prefill {PROMPT}: {PROMPT / prefill:.0f} tok/s\ndecode, batch 1: {TOKENS / decode:.1f} tok/s")


if __name__ == "__main__":
    main()
