"""The engine: takes prompts, steps scheduler, model and sampler, and gives completions back."""

import codecs
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from flexjudge_fast.engine.ahead import make_stepper
from flexjudge_fast.engine.completion import Completion, complete
from flexjudge_fast.engine.config import EngineConfig
from flexjudge_fast.engine.interrupts import interrupts_held
from flexjudge_fast.engine.prompts import PromptLike
from flexjudge_fast.engine.request import Request
from flexjudge_fast.engine.sampling_params import SamplingParams
from flexjudge_fast.engine.setup import EngineParts, load_parts
from flexjudge_fast.engine.stats import EngineStats
from flexjudge_fast.errors import EngineStateError, InvalidArgumentError, RequestTooLargeError
from flexjudge_fast.media.items import MediaItem, MediaOptions
from flexjudge_fast.media.prepared import AnyMedia
from flexjudge_fast.prompts.grammar import AnswerGrammar
from flexjudge_fast.prompts.segments import Prompt

TextCallback = Callable[[int, int, str], None]
_MOST_MEDIA_BYTES = 512 << 20  # pixels of one call's inputs, before no more are drawn


@dataclass(frozen=True)
class EngineInput:
    """One prompt for `Engine.run`, how to sample, and the grammar of the answer, if any."""

    prompt: Prompt
    params: SamplingParams
    grammar: AnswerGrammar | None = None
    all_logits: bool = False


@dataclass(frozen=True)
class EngineOutput:
    """All samples of the input number `index`, or the error that refused it."""

    index: int
    completions: tuple[Completion, ...] = ()
    error: Exception | None = None
    logits: torch.Tensor | None = None  # [num_tokens, vocab_size] float32, for `all_logits`


@dataclass
class _Run:
    """What one call of `Engine.run` has in flight."""

    open: dict[int, list[Request]] = field(default_factory=dict)  # finished samples, by input index
    media_bytes: dict[int, int] = field(default_factory=dict)  # pixels that open inputs hold
    requests: dict[int, tuple[int, Request]] = field(default_factory=dict)  # not yet given out, by id
    outputs: deque[EngineOutput] = field(default_factory=deque)
    emitted: dict[tuple[int, int], tuple[codecs.IncrementalDecoder, int]] = field(default_factory=dict)

    @property
    def has_room(self) -> bool:
        """Whether another input may be drawn: long videos take hundreds of megabytes each."""
        return sum(self.media_bytes.copy().values()) < _MOST_MEDIA_BYTES


class Engine:
    """Continuous batching over one model. Any number of threads may call it; each call steps for all."""

    def __init__(self, parts: EngineParts) -> None:
        self._parts = parts
        self.tokenizer = parts.tokenizer
        self.max_model_len = parts.max_model_len
        self._stepper = make_stepper(parts.scheduler, parts.runner, self._deliver, self._forked)
        self._lock = threading.Lock()
        self._runs: dict[int, tuple[_Run, int]] = {}  # request id to the call that waits, and input index
        self._cancelled: deque[_Run] = deque()
        self._next_id = 0
        self._pid = os.getpid()
        self._closed = False

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        quantization: str | None = None,
        ignore_config: Sequence[str] = (),
        judge_backbone: str | Path | None = None,
        base_llm: str | Path | None = None,
        **limits: Any,
    ) -> "Engine":
        """Load a model.

        Args:
            model: a Hugging Face folder, a hub id, or a `.gguf` file.
            device: "auto", "cpu", "cuda", "cuda:1".
            dtype: of activations, dense weights and (see `kv_cache_dtype`) the KV cache; "auto" is the
                checkpoint's own.
            quantization: `None` keeps weights as stored. "int8" and "int4" quantise them at load ("int4-g64"
                and "int4-g128" with groups of 64 or 128 weights instead of 32), embeddings and LM head always
                to 8 bits. "w8a8-int8" and "w8a8-fp8" (GPUs only) compute layers on 8-bit weights and
                activations. "dequantize" expands quantised ones to `dtype`.
            ignore_config: unknown fields of config.json to accept.
            judge_backbone, base_llm: of a Mol-LLaMA: the Llama that takes its base's place, and the base.
            limits: fields of `EngineConfig`.
        """
        unknown = set(limits) - set(EngineConfig.__dataclass_fields__)
        if unknown:
            known = ", ".join(EngineConfig.__dataclass_fields__)
            raise InvalidArgumentError(f"unknown argument {min(unknown)!r}; engine limits are: {known}")
        config = EngineConfig(**limits)
        more = (judge_backbone, base_llm)
        return cls(load_parts(model, device, dtype, quantization, ignore_config, config, *more))

    @property
    def stop_ids(self) -> frozenset[int]:
        """The tokens by which the model ends its turn."""
        return self._parts.eos_ids

    @property
    def provenance(self) -> dict[str, str]:
        """Model path, hash of its weights, how it computes, and the version of this engine."""
        from flexjudge_fast import __version__

        checkpoint = self._parts.checkpoint
        return {
            "model": str(checkpoint.path),
            "weights_hash": checkpoint.weights_hash(),
            "dtype": str(self._parts.runner.model.dtype).removeprefix("torch."),
            "arithmetic": self._parts.arithmetic,
            "engine_version": __version__,
        }

    def generate(
        self, prompts: Sequence[PromptLike], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Completion]:
        """Complete prompts.

        Args:
            prompts: each a string (the caller's own: control tokens in it count), token ids, or chat
                messages (whose contents never become control tokens).
            params: for all prompts, or one for each.

        Returns:
            The completions in the prompts' order; with `n` > 1, the `n` samples of a prompt together.
        """
        if isinstance(prompts, str):
            raise InvalidArgumentError("prompts: a list of prompts is expected, not one string")
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(prompts)
        if len(params) != len(prompts):
            raise InvalidArgumentError(f"params: {len(params)} given for {len(prompts)} prompts")
        inputs = [EngineInput(self.encode(p), q) for p, q in zip(prompts, params, strict=True)]
        outputs: dict[int, EngineOutput] = {}
        for item in inputs:
            self._check_size(item)
        for output in self.run(inputs):
            outputs[output.index] = _raised(output)
        return [completion for i in range(len(inputs)) for completion in outputs[i].completions]

    def logits(self, prompt: PromptLike) -> torch.Tensor:
        """The logits after every token of `prompt`, [num_tokens, vocab_size] float32, on the CPU."""
        item = EngineInput(self.encode(prompt), SamplingParams(max_tokens=1), all_logits=True)
        (output,) = self.run([item])
        logits = _raised(output).logits
        assert logits is not None
        return logits

    def encode(self, prompt: PromptLike) -> Prompt:
        """A prompt's token ids, and its media where it is given as messages."""
        self._check_usable()
        return self._parts.prompts.encode(prompt)

    def read_media(self, items: Sequence[MediaItem], options: MediaOptions) -> list[Future[AnyMedia]]:
        """Start to decode and resize media, in threads.

        Raises:
            UnsupportedMediaError: the model does not read this kind of media. What is wrong with a medium
                itself is raised by its future, as a MediaError.
        """
        self._check_usable()
        return self._parts.prompts.read_media(items, options)

    def run(
        self,
        inputs: Iterable[EngineInput | Exception | Future[Any]],
        on_text: TextCallback | None = None,
        window: int | None = None,
    ) -> Iterator[EngineOutput]:
        """Work through inputs and yield each one's output as soon as it is finished.

        Inputs are drawn lazily, `window` ahead, so an endless iterable is fine. Leaving the iterator early
        cancels what is in flight. An input that cannot run yields an output with its `error`; an error in
        place of an input is passed on in the same way. A future in its place says that the next input waits
        for it; what is in flight goes on meanwhile.

        Args:
            on_text: called with (input index, sample index, new text) after each step.
        """
        self._check_usable()
        run = _Run()
        source, count = iter(inputs), 0
        window = window or 2 * self._parts.scheduler.limits.max_num_seqs
        exhausted = False
        try:
            while True:
                while not exhausted and len(run.open) + len(run.outputs) < window and run.has_room:
                    item = next(source, None)
                    exhausted = item is None
                    if isinstance(item, Future):
                        if run.open or run.outputs:
                            break
                        wait([item])
                    elif item is not None:
                        self._submit(run, count, item)
                        count += 1
                if run.open and not run.outputs:
                    self._step()
                _emit(run, on_text)
                while run.outputs:
                    output = run.outputs.popleft()
                    _emit(run, on_text)  # another thread may have finished it since
                    yield output
                if exhausted and not run.open and not run.outputs:
                    return
        finally:
            self._cancel(run)

    def stats(self) -> EngineStats:
        """Blocks, queues, cache hits and tokens computed so far."""
        with self._lock:
            self._drop_cancelled()
            return self._stepper.stats()

    def check_integrity(self) -> None:
        """Raise AssertionError if the KV blocks are not accounted for to the last one."""
        with self._lock:
            self._drop_cancelled()
            self._parts.scheduler.check_integrity()

    def close(self) -> None:
        """Refuse further calls and drop the model's memory."""
        if self._closed:
            return
        self._closed = True
        self._parts.prompts.close()
        self._parts.runner.release()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_usable(self) -> None:
        if self._closed:
            raise EngineStateError("this engine is closed")
        if os.getpid() != self._pid:
            raise EngineStateError(
                f"this engine was made in process {self._pid} and cannot be used in its fork {os.getpid()}; "
                "load the model in the process that uses it"
            )

    @property
    def _room(self) -> int:
        """The most tokens that one sequence can ever have."""
        scheduler = self._parts.scheduler  # one block less: a fork may have to copy the one it writes to
        return min(self.max_model_len, (scheduler.pool.num_blocks - 1) * scheduler.limits.block_size)

    def _check_size(self, item: EngineInput) -> None:
        """Refuse what can never run, with the numbers."""
        need = len(item.prompt) + (0 if item.all_logits else 1)
        if item.grammar is not None:
            need += item.grammar.start().reserve()
        ahead = self._parts.prompts.positions_ahead(item.prompt)
        if need + ahead > self.max_model_len:
            raise RequestTooLargeError(
                f"the prompt has {len(item.prompt)} tokens and needs room for {need}; its media reach "
                f"{ahead} positions further; the context holds {self.max_model_len}"
            )
        if need > self._room:
            raise RequestTooLargeError(
                f"the prompt has {len(item.prompt)} tokens and needs room for {need}; the context holds "
                f"{self.max_model_len}, the KV cache {self._room} for one sequence"
            )

    def _submit(self, run: _Run, index: int, item: EngineInput | Exception) -> None:
        if isinstance(item, Exception):
            run.outputs.append(EngineOutput(index, error=item))
            return
        try:
            self._check_size(item)
        except RequestTooLargeError as error:
            run.outputs.append(EngineOutput(index, error=error))
            return
        params, parts = item.params, self._parts
        eos = frozenset() if params.ignore_eos else parts.eos_ids
        ahead = parts.prompts.positions_ahead(item.prompt)
        with self._lock:
            request = Request(
                id=self._new_id(),
                prompt=item.prompt.token_ids,
                params=params,
                text=self.tokenizer,
                stop_ids=eos | frozenset(params.stop_token_ids),
                max_len=min(self._room, self.max_model_len - ahead, len(item.prompt) + params.max_tokens),
                media=item.prompt.media,
                positions=parts.prompts.positions(item.prompt),
                grammar=None if item.grammar is None else item.grammar.start(),
                masked=parts.masked_ids,
                all_logits=item.all_logits,
                samples=params.n,
            )
            run.open[index] = []
            run.media_bytes[index] = item.prompt.media_bytes
            self._track(run, index, request)
            parts.scheduler.add(request)

    def _new_id(self) -> int:
        self._next_id += 1
        return self._next_id

    def _track(self, run: _Run, index: int, request: Request) -> None:
        self._runs[request.id] = (run, index)
        run.requests[request.id] = (index, request)

    def _forked(self, parent: Request, child: Request) -> None:
        """The stepper made another sample: it belongs to the same input."""
        child.id = self._new_id()
        if child.probe is None:
            self._track(*self._runs[parent.id], child)

    def _deliver(self, request: Request) -> None:
        """The stepper finished a sample; the input's output is ready with the last one."""
        run, index = self._runs.pop(request.id)
        run.open[index].append(request)
        if len(run.open[index]) == request.params.n:
            samples = sorted(run.open[index], key=lambda r: r.sample_index)
            logits = torch.cat(request.logits) if request.logits else None
            completions = tuple(complete(r) for r in samples)
            error = next((c.error for c in completions if c.error is not None), None)
            run.outputs.append(EngineOutput(index, completions, error, logits))
            del run.media_bytes[index]
            del run.open[index]  # last: the waiting thread, which holds no lock, looks here first

    def _step(self) -> None:
        with self._lock, interrupts_held():
            self._drop_cancelled()
            if self._parts.scheduler.waiting or self._parts.scheduler.running:
                self._stepper.step()

    def _cancel(self, run: _Run) -> None:
        """Give back what a left or finished call still holds: now, or before the next step."""
        # A generator may be closed by the garbage collector inside a step of this very thread, so this
        # never waits for the lock.
        if run.open:
            self._cancelled.append(run)
            if self._lock.acquire(blocking=False):
                try:
                    self._drop_cancelled()
                finally:
                    self._lock.release()

    def _drop_cancelled(self) -> None:
        while self._cancelled:
            run = self._cancelled.popleft()
            dropped = {request_id for request_id, (other, _) in self._runs.items() if other is run}
            for request_id in dropped:
                del self._runs[request_id]
            self._stepper.cancel(dropped)


def _raised(output: EngineOutput) -> EngineOutput:
    if output.error is not None:
        raise output.error
    return output


def _emit(run: _Run, on_text: TextCallback | None) -> None:
    """Give the callback what is new and complete: a character cut in two waits for its rest."""
    for request_id, (index, request) in list(run.requests.items()):
        finished = request.finish_reason is not None  # read first: another thread may be stepping
        if on_text is not None:
            key = (index, request.sample_index)
            decoder, read = run.emitted.get(key) or (codecs.getincrementaldecoder("utf-8")("replace"), 0)
            new = bytes(request.output[read:])
            text = decoder.decode(new, final=finished)
            run.emitted[key] = (decoder, read + len(new))
            if text:
                on_text(index, request.sample_index, text)
        if finished:
            del run.requests[request_id]
            run.emitted.pop((index, request.sample_index), None)
