"""llama.cpp through `llama-cpp-python`'s low-level calls, which decode several sequences in one batch."""

import ctypes
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench.engines import MissingError

CACHE = Path.home() / ".cache" / "flexjudge" / "bench"
MAX_SEQS, MAX_TOKENS = 16, 512


class LlamaCpp:
    def __init__(self, model: Path, label: str, threads: int) -> None:
        llama = self._llama = _library()
        self.name = f"llama.cpp, {label}"
        self._quiet = llama.llama_log_callback(lambda level, text, data: None)  # kept: the library calls it
        llama.llama_log_set(self._quiet, None)
        llama.llama_backend_init()
        self._model = llama.llama_model_load_from_file(
            str(model).encode(), llama.llama_model_default_params()
        )
        params = llama.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = (
            4096,
            MAX_TOKENS,
            MAX_TOKENS,
            MAX_SEQS,
        )
        params.kv_unified = True  # one sequence may use all of the context
        params.n_threads = params.n_threads_batch = threads
        self._context = llama.llama_init_from_model(self._model, params)
        if not self._context:
            raise MissingError(f"llama.cpp cannot make a context for {model.name}")
        self._size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))
        self._batch = llama.llama_batch_init(MAX_TOKENS, 0, 1)

    def prefill(self, num_tokens: int) -> float:
        self._clear()
        tokens = list(range(10, 10 + num_tokens))
        start = time.perf_counter()
        self._decode(tokens, list(range(num_tokens)), [0] * num_tokens, [num_tokens - 1])
        self._likeliest(num_tokens - 1)
        return time.perf_counter() - start

    def decode(self, batch: int, num_tokens: int) -> float:
        self._clear()
        tokens = [token for i in range(batch) for token in (i + 1, 2, 3)]
        seqs = [i for i in range(batch) for _ in range(3)]
        self._decode(tokens, [0, 1, 2] * batch, seqs, [3 * i + 2 for i in range(batch)])
        current = [self._likeliest(3 * i + 2) for i in range(batch)]
        start = time.perf_counter()
        for step in range(num_tokens):
            self._decode(current, [3 + step] * batch, list(range(batch)), list(range(batch)))
            current = [self._likeliest(i) for i in range(batch)]
        return time.perf_counter() - start

    def _clear(self) -> None:
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), True)

    def _decode(self, tokens: list[int], positions: list[int], seqs: list[int], wanted: list[int]) -> None:
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, (token, position, seq) in enumerate(zip(tokens, positions, seqs, strict=True)):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, seq, 0
        for i in wanted:
            batch.logits[i] = 1
        if self._llama.llama_decode(self._context, batch) != 0:
            raise RuntimeError("llama_decode failed")

    def _likeliest(self, index: int) -> int:
        logits = self._llama.llama_get_logits_ith(self._context, index)
        return int(np.ctypeslib.as_array(logits, (self._size,)).argmax())


def requantised(model: Path, ftype: int, label: str) -> Path:
    """`model` in another of llama.cpp's formats, written once to the user's cache."""
    llama = _library()
    out = CACHE / f"{model.stem}-{label}.gguf"
    if not out.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        params = llama.llama_model_quantize_default_params()
        params.ftype, params.allow_requantize = ftype, True
        part = out.with_suffix(".part")
        if llama.llama_model_quantize(str(model).encode(), str(part).encode(), ctypes.byref(params)) != 0:
            raise MissingError(f"llama.cpp cannot requantise {model.name} to {label}")
        part.rename(out)
    return out


def _library() -> Any:  # the module has no types of its own
    try:
        import llama_cpp
    except ImportError as error:
        raise MissingError("llama-cpp-python is not installed (pip install llama-cpp-python)") from error
    return llama_cpp
