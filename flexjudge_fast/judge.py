"""The judge: instructions and responses in, verdicts out."""

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flexjudge_fast.engine.completion import Completion
from flexjudge_fast.engine.engine import Engine, EngineInput, EngineOutput
from flexjudge_fast.engine.sampling_params import SamplingParams
from flexjudge_fast.errors import FlexJudgeError, InvalidArgumentError
from flexjudge_fast.media.prepared import AnyMedia
from flexjudge_fast.media.reader import result_of
from flexjudge_fast.prompts.builder import build_messages
from flexjudge_fast.prompts.formats import Kind
from flexjudge_fast.prompts.grammar import AnswerGrammar
from flexjudge_fast.prompts.judgement import Judgement, Response
from flexjudge_fast.prompts.templates import PromptTemplate, load_template
from flexjudge_fast.tally import best_of, read_vote, tally
from flexjudge_fast.verdict import BestOf, Provenance, Usage, Verdict, VerdictTimings

ResponseLike = str | Response
Stream = Callable[["TextEvent"], None]
_MEDIA_AHEAD = 8  # judgements whose media are read before they are needed


@dataclass(frozen=True)
class TextEvent:
    """New text of one vote: which judgement (by index), which order of responses, which sample."""

    index: int
    order: tuple[int, ...]
    sample: int
    text: str


@dataclass
class _Open:
    """A judgement in flight: its orders, and what the engine has given back for them."""

    index: int
    judgement: Judgement
    template: PromptTemplate
    orders: list[tuple[int, ...]]
    outputs: dict[int, EngineOutput] = field(default_factory=dict)


@dataclass
class _Reading:
    """A judgement's media while they are read: their names and futures, or why they cannot be."""

    names: Sequence[str] = ()
    futures: "Sequence[Future[AnyMedia]]" = ()
    error: FlexJudgeError | None = None

    def pending(self) -> "Iterator[Future[AnyMedia]]":
        """What is still to wait for, again and again until nothing is."""
        for future in self.futures:
            while not future.done():
                yield future

    def result(self) -> dict[str, AnyMedia]:
        """By name. Raises what went wrong."""
        if self.error is not None:
            raise self.error
        return {name: result_of(future) for name, future in zip(self.names, self.futures, strict=True)}

    def cancel(self) -> None:
        for future in self.futures:
            future.cancel()


class Judge:
    """Judges with one model. Safe to call from several threads; their work is batched together."""

    def __init__(self, engine: Engine, template: str | Path | None = None) -> None:
        self.engine = engine
        self.template = load_template(template)
        self._templates: dict[str, PromptTemplate] = {}

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        device: str = "auto",
        dtype: str = "auto",
        quantization: str | None = None,
        template: str | Path | None = None,
        ignore_config: Sequence[str] = (),
        judge_backbone: str | Path | None = None,
        base_llm: str | Path | None = None,
        **limits: Any,
    ) -> "Judge":
        """Load a judge.

        Args:
            model: a Hugging Face folder, a hub id, or a `.gguf` file.
            template: a TOML file with the wording of the prompts; the built-in one when `None`.
            device, dtype, quantization, ignore_config, limits, and a Mol-LLaMA's judge_backbone and
                base_llm: see `Engine.from_pretrained`.
        """
        backbones = (judge_backbone, base_llm)
        engine = Engine.from_pretrained(
            model, device, dtype, quantization, ignore_config, *backbones, **limits
        )
        return cls(engine, template)

    def score(
        self, instruction: str, response: ResponseLike, *, stream: Stream | None = None, **options: Any
    ) -> Verdict:
        """Score one response. `options` are fields of `Judgement`, for all four calls."""
        return self._one("score", instruction, (response,), options, stream)

    def compare(
        self,
        instruction: str,
        responses: Sequence[ResponseLike],
        *,
        stream: Stream | None = None,
        **options: Any,
    ) -> Verdict:
        """Score two responses side by side; the higher score wins, equal scores tie."""
        return self._one("pair", instruction, responses, options, stream)

    def rank(
        self,
        instruction: str,
        responses: Sequence[ResponseLike],
        *,
        stream: Stream | None = None,
        **options: Any,
    ) -> Verdict:
        """Score two or more responses, no two alike."""
        return self._one("rank", instruction, responses, options, stream)

    def choose(
        self,
        instruction: str,
        responses: Sequence[ResponseLike],
        *,
        stream: Stream | None = None,
        **options: Any,
    ) -> Verdict:
        """Choose between two responses: either is better, both are good, or both are bad."""
        return self._one("choice", instruction, responses, options, stream)

    def best_of(
        self,
        instruction: str,
        responses: Sequence[ResponseLike],
        *,
        stream: Stream | None = None,
        **options: Any,
    ) -> BestOf:
        """Score each response by itself, from 1.0 to 10.0 unless `scale` says else, and name the best.

        A response that cannot be judged has no score; only if that is so for all, an error is raised.
        """
        if isinstance(responses, str) or not isinstance(responses, Sequence) or not responses:
            raise InvalidArgumentError("responses: a list of at least one response is expected")
        options.setdefault("scale", (1.0, 10.0))
        _check_options(options, stream)
        items = [Judgement("score", instruction, (response,), **options) for response in responses]
        errors: list[Exception] = []
        found = sorted(self._verdicts(items, stream, errors.append), key=lambda verdict: verdict.index)
        if len(errors) == len(items):
            raise errors[0]
        return best_of(found)

    def run(
        self,
        judgements: Iterable[Judgement],
        *,
        stream: Stream | None = None,
        progress: bool = False,
    ) -> Iterator[Verdict]:
        """Work through judgements; each verdict comes as soon as it is reached, `index` says whose it is.

        Judgements are drawn lazily and computed side by side. One that cannot be judged yields a verdict
        with `finish_reason="error"`; the others go on.
        """
        verdicts = self._verdicts(judgements, stream)
        if not progress:
            return verdicts
        from flexjudge_fast.progress import with_progress

        total = len(judgements) if isinstance(judgements, Sequence) else None
        return with_progress(verdicts, total)

    def _one(
        self,
        kind: Kind,
        instruction: str,
        responses: Sequence[ResponseLike],
        options: dict[str, Any],
        stream: Stream | None,
    ) -> Verdict:
        _check_options(options, stream)
        judgement = Judgement(kind, instruction, responses, **options)
        (verdict,) = self._verdicts([judgement], stream, _raise)
        return verdict

    def _verdicts(
        self,
        judgements: Iterable[Judgement],
        stream: Stream | None,
        on_error: Callable[[Exception], None] | None = None,
    ) -> Iterator[Verdict]:
        """on_error: is called with what went wrong, before the verdict that says so."""
        places: dict[int, tuple[_Open, int]] = {}  # engine input index to judgement and order

        def inputs() -> Iterator[EngineInput | Exception | Future[AnyMedia]]:
            count = 0
            for index, judgement, reading in self._read_ahead(judgements):
                yield from reading.pending()
                try:
                    opened, items = self._inputs(judgement, index, reading.result())
                except FlexJudgeError as error:
                    opened, items = _Open(index, judgement, self.template, [()]), [error]
                for place, item in enumerate(items):
                    places[count] = (opened, place)
                    count += 1
                    yield item

        def on_text(index: int, sample: int, text: str) -> None:
            assert stream is not None
            opened, place = places[index]
            stream(TextEvent(opened.index, opened.orders[place], sample, text))

        outputs = self.engine.run(inputs(), on_text if stream is not None else None)
        try:
            for output in outputs:
                opened, place = places.pop(output.index)
                opened.outputs[place] = output
                if len(opened.outputs) == len(opened.orders):
                    yield self._verdict(opened, on_error)
        finally:
            outputs.close()  # type: ignore[attr-defined]

    def _read_ahead(self, judgements: Iterable[Judgement]) -> Iterator[tuple[int, Judgement, "_Reading"]]:
        """Judgements with their media; those of the next few are read in threads meanwhile."""
        ahead: deque[tuple[int, Judgement, _Reading]] = deque()
        try:
            for index, judgement in enumerate(judgements):
                ahead.append((index, judgement, self._start_reading(judgement, index)))
                while ahead and (len(ahead) > _MEDIA_AHEAD or not ahead[0][2].futures):
                    yield ahead.popleft()
            while ahead:
                yield ahead.popleft()
        finally:
            for _, _, reading in ahead:
                reading.cancel()

    def _start_reading(self, judgement: Judgement, index: int) -> "_Reading":
        try:
            if not isinstance(judgement, Judgement):
                raise InvalidArgumentError(
                    f"judgement {index}: expected a Judgement, got {type(judgement).__name__}"
                )
            items = judgement.media
            futures = self.engine.read_media(items, judgement.media_options) if items else []
            return _Reading([item.name for item in items], futures)
        except FlexJudgeError as error:
            return _Reading(error=error)

    def _inputs(
        self, judgement: Judgement, index: int = 0, media: Mapping[str, AnyMedia] | None = None
    ) -> tuple[_Open, list[EngineInput | Exception]]:
        """The engine inputs of a judgement, one per order of its responses. `media`: read, by name."""
        template = self._template(judgement)
        answer_format = judgement.format
        grammar = None
        if judgement.guided == "on":
            grammar = AnswerGrammar(
                self.engine.tokenizer, answer_format, judgement.max_think_tokens, self.engine.stop_ids
            )
            needed = grammar.start().reserve()
            if needed > judgement.max_tokens:
                raise InvalidArgumentError(
                    f"max_tokens={judgement.max_tokens}: the answer alone takes up to {needed} tokens"
                )
        params = SamplingParams(
            temperature=judgement.temperature,
            top_p=judgement.top_p,
            seed=judgement.seed,
            n=judgement.votes,
            max_tokens=judgement.max_tokens,
        )
        orders = _orders(judgement, media or {})
        items: list[EngineInput | Exception] = []
        for order in orders:
            prompt = self.engine.encode(build_messages(judgement, template, order, media))
            items.append(EngineInput(prompt, params, grammar))
        return _Open(index, judgement, template, orders), items

    def _template(self, judgement: Judgement) -> PromptTemplate:
        if judgement.template is None:
            return self.template
        key = str(judgement.template)
        if key not in self._templates:
            self._templates[key] = load_template(judgement.template)
        return self._templates[key]

    def _verdict(self, opened: _Open, on_error: Callable[[Exception], None] | None) -> Verdict:
        judgement = opened.judgement
        outputs = [opened.outputs[i] for i in range(len(opened.orders))]
        for output in outputs:
            if output.error is not None:
                if on_error is not None:
                    on_error(output.error)
                return _error_verdict(judgement, opened.index, output.error)
        votes = [
            read_vote(completion, judgement.format, order, judgement.guided == "on")
            for output, order in zip(outputs, opened.orders, strict=True)
            for completion in output.completions
        ]
        completions = [c for output in outputs for c in output.completions]
        firsts = [output.completions[0] for output in outputs]
        usage = Usage(
            prompt=sum(len(c.prompt_token_ids) for c in firsts),
            cached=sum(c.num_cached_tokens for c in firsts),
            generated=sum(len(c.token_ids) for c in completions),
        )
        known = self.engine.provenance
        provenance = Provenance(template=opened.template.label, seed=judgement.seed, **known)
        return tally(judgement, votes, usage, _timings(completions), provenance, opened.index)


def _check_options(options: Mapping[str, Any], stream: Stream | None) -> None:
    if stream is not None and not callable(stream):
        raise InvalidArgumentError(
            f"stream={stream!r}: a function is expected, it gets a TextEvent at a time"
        )
    for name in options:
        if name not in Judgement.__dataclass_fields__:
            known = ", ".join(Judgement.__dataclass_fields__)
            raise InvalidArgumentError(f"unknown argument {name!r}; known are: {known}")


def _raise(error: Exception) -> None:
    raise error


def _orders(judgement: Judgement, media: Mapping[str, AnyMedia]) -> list[tuple[int, ...]]:
    """The orders in which the model sees the responses."""
    fixed = tuple(range(len(judgement.responses)))
    if len(fixed) == 1 or judgement.order == "fixed":
        return [fixed]
    if judgement.order == "both":
        return [fixed, fixed[::-1]]
    # Keyed by content, so that a judgement's order does not depend on its place in a run.
    texts = [r.text if isinstance(r, Response) else r for r in judgement.responses]
    content = f"{judgement.seed}/{judgement.instruction}/{texts!r}/{[m.key for m in media.values()]!r}"
    shuffled = list(fixed)
    random.Random(content).shuffle(shuffled)
    return [tuple(shuffled)]


def _timings(completions: Sequence[Completion]) -> VerdictTimings:
    arrival = min(c.timings.arrival for c in completions)
    first = min((c.timings.first_token or c.timings.finished) for c in completions)
    total = max(c.timings.finished for c in completions) - arrival
    generated = sum(len(c.token_ids) for c in completions)
    return VerdictTimings(first - arrival, total, generated / total if total > 0 else 0.0)


def _error_verdict(judgement: object, index: int, error: Exception) -> Verdict:
    kind = judgement.kind if isinstance(judgement, Judgement) else ""
    name = judgement.id if isinstance(judgement, Judgement) else None
    return Verdict(kind, "error", error=f"{type(error).__name__}: {error}", index=index, id=name)
