"""llama.cpp through `llama-cpp-python`'s low-level calls, which decode several sequences in one batch."""

import ctypes
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.engines import MAX_BATCH, MAX_PROMPT, MissingError, prompt, short_prompts

CACHE = Path.home() / ".cache" / "flexjudge" / "bench"
Q4_0 = 2  # LLAMA_FTYPE_MOSTLY_Q4_0


@dataclass(frozen=True)
class Settings:
    """How a context is made: what its users try when they look for speed."""

    flash_attention: bool
    unified: bool  # one KV buffer for all sequences, instead of one each

    def __str__(self) -> str:
        attention = "on" if self.flash_attention else "off"
        return f"flash attention {attention}, {'one KV buffer' if self.unified else 'a KV buffer each'}"


SETTINGS = tuple(Settings(attention, unified) for attention in (True, False) for unified in (False, True))


class Context:
    """A model and a context: tokens in, logits at the last row of each run, draws in C."""

    def __init__(self, model: Path, threads: int, settings: Settings, max_tokens: int, max_seqs: int) -> None:
        llama = self.llama = library()
        self._quiet = llama.llama_log_callback(lambda level, text, data: None)  # kept: the library calls it
        llama.llama_log_set(self._quiet, None)
        llama.llama_backend_init()
        self._model = llama.llama_model_load_from_file(
            str(model).encode(), llama.llama_model_default_params()
        )
        if not self._model:
            raise MissingError(f"llama.cpp cannot load {model.name}")
        self._threads, self._max_tokens, self._max_seqs = threads, max_tokens, max_seqs
        self._size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))
        self._batch = llama.llama_batch_init(max_tokens, 0, 1)
        self._context: Any = None
        self.set(settings)

    def set(self, settings: Settings) -> None:
        """Make the context anew."""
        llama = self.llama
        if self._context:
            llama.llama_free(self._context)
        params = llama.llama_context_default_params()
        params.n_batch = params.n_ubatch = min(self._max_tokens, MAX_PROMPT)
        params.n_seq_max = self._max_seqs
        params.n_ctx = 8192 if settings.unified else 1024 * self._max_seqs
        params.kv_unified = settings.unified
        params.flash_attn_type = int(settings.flash_attention)
        params.n_threads = params.n_threads_batch = self._threads
        self._context = llama.llama_init_from_model(self._model, params)
        if not self._context:
            raise MissingError(f"llama.cpp cannot make a context ({settings})")
        self.settings = settings
        self.memory = llama.llama_get_memory(self._context)

    def clear(self) -> None:
        self.llama.llama_memory_clear(self.memory, True)

    def feed(
        self, tokens: Sequence[int], positions: Sequence[int], seqs: Sequence[int], wanted: Sequence[int]
    ) -> None:
        """One `llama_decode`; logits are computed for the rows `wanted`."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, (token, position, seq) in enumerate(zip(tokens, positions, seqs, strict=True)):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, seq, 0
        for i in wanted:
            batch.logits[i] = 1
        if self.llama.llama_decode(self._context, batch) != 0:
            raise RuntimeError("llama_decode failed")

    def likeliest(self, row: int) -> int:
        logits = self.llama.llama_get_logits_ith(self._context, row)
        return int(np.ctypeslib.as_array(logits, (self._size,)).argmax())

    def sampler(self, top_k: int, top_p: float, temperature: float, seed: int) -> Any:
        """A chain of llama.cpp's own samplers, for `draw`."""
        llama = self.llama
        chain = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
        for part in (
            llama.llama_sampler_init_top_k(top_k),
            llama.llama_sampler_init_top_p(top_p, 1),
            llama.llama_sampler_init_temp(temperature),
            llama.llama_sampler_init_dist(seed),
        ):
            llama.llama_sampler_chain_add(chain, part)
        return chain

    def draw(self, sampler: Any, row: int) -> int:
        return int(self.llama.llama_sampler_sample(sampler, self._context, row))

    def close(self) -> None:
        self.llama.llama_batch_free(self._batch)
        self.llama.llama_free(self._context)
        self.llama.llama_model_free(self._model)


class LlamaCpp:
    """Takes the fastest of some settings, tried when it is opened."""

    def __init__(self, model: Path, label: str, threads: int, choice: Sequence[Settings] = SETTINGS) -> None:
        self._run = Context(model, threads, choice[0], MAX_PROMPT, MAX_BATCH)
        if len(choice) > 1:
            self._run.set(min(choice, key=self._try))
        self.name = f"llama.cpp, {label} ({self._run.settings})"

    def _try(self, settings: Settings) -> float:
        self._run.set(settings)
        self.prefill(16)
        return self.prefill(128) + self.decode(8, 8) + self.decode(1, 8)

    def prefill(self, num_tokens: int) -> float:
        self._run.clear()
        start = time.perf_counter()
        self._run.feed(prompt(num_tokens), range(num_tokens), [0] * num_tokens, [num_tokens - 1])
        self._run.likeliest(num_tokens - 1)
        return time.perf_counter() - start

    def decode(self, batch: int, num_tokens: int) -> float:
        run, prompts = self._run, short_prompts(batch)
        run.clear()
        length = len(prompts[0])
        seqs = [i for i in range(batch) for _ in range(length)]
        ends = [length * (i + 1) - 1 for i in range(batch)]
        run.feed([token for ids in prompts for token in ids], [*range(length)] * batch, seqs, ends)
        current = [run.likeliest(end) for end in ends]
        start = time.perf_counter()
        for step in range(num_tokens):
            run.feed(current, [length + step] * batch, range(batch), range(batch))
            current = [run.likeliest(i) for i in range(batch)]
        return time.perf_counter() - start

    def close(self) -> None:
        self._run.close()


def requantised(model: Path, ftype: int, label: str) -> Path:
    """`model` in another of llama.cpp's formats, written once to the user's cache."""
    llama = library()
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


def library() -> Any:  # the module has no types of its own
    """The Python module `llama_cpp`."""
    try:
        import llama_cpp
    except ImportError as error:
        raise MissingError("llama-cpp-python is not installed (pip install llama-cpp-python)") from error
    return llama_cpp
