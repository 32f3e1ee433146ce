"""The answer grammar, walked by a model that is drawn at random: only legal answers, and exact odds."""

import itertools
import math
import random
import re
from collections.abc import Iterator
from typing import Any

import pytest

from flexjudge_fast.prompts.formats import CHOICES, AnswerFormat, Scale
from flexjudge_fast.prompts.grammar import AnswerGrammar, AnswerState
from flexjudge_fast.prompts.tokenizer import Tokenizer
from tests.prompts.vocabularies import from_gguf, llama3_like, qwen, sentencepiece_like

FORMATS = {
    "score": AnswerFormat("score", 1, Scale(1, 10)),
    "score-5": AnswerFormat("score", 1, Scale(1, 5)),
    "score-0-100": AnswerFormat("score", 1, Scale(0, 100)),
    "score-teens": AnswerFormat("score", 1, Scale(10, 19)),
    "decimals": AnswerFormat("score", 1, Scale(1.0, 10.0)),
    "pair": AnswerFormat("pair", 2, Scale(1, 10)),
    "pair-decimals": AnswerFormat("pair", 2, Scale(0.5, 2.0)),
    "rank": AnswerFormat("rank", 4, Scale(1, 10)),
    "rank-all": AnswerFormat("rank", 10, Scale(1, 10)),
    "rank-decimals": AnswerFormat("rank", 5, Scale(1.0, 1.4)),
    "choice": AnswerFormat("choice", 2, Scale()),
}
TOKENIZERS = {"qwen": qwen, "llama3": llama3_like, "sentencepiece": sentencepiece_like}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return TOKENIZERS[request.param]().ours


class RandomModel:
    """Log-probabilities that are a function of the tokens before, as a model's are."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(self, before: tuple[int, ...], token_id: int) -> float:
        return random.Random(repr((self.seed, before, token_id))).uniform(-12.0, -0.01)


def watch_slot(state: AnswerState, before: tuple[int, ...], model: RandomModel) -> None:
    """Do at a slot's start what the engine does: observe the root, then run the probes."""
    slot = state.slot_start()
    if slot is None:
        return
    prefixes = {()} | {p.prefix[:n] for p in state.probes() for n in range(1, len(p.prefix) + 1)}
    for prefix in prefixes:
        ids = state.watch(slot, prefix)
        state.observe(slot, prefix, {i: model((*before, *prefix), i) for i in ids})


def walk(state: AnswerState, rng: random.Random, free: list[int], model: RandomModel) -> list[int]:
    """Generate to the end; while the model reasons freely its tokens come from `free`."""
    ids: list[int] = []
    while not state.finished():
        if forced := state.forced():
            for token_id in forced:
                ids.append(token_id)
                state.advance(token_id)
            continue
        watch_slot(state, tuple(ids), model)
        allowed = state.allowed()
        if allowed is None and not free:
            state.close()
            continue
        token_id = free.pop(0) if allowed is None else rng.choice(list(allowed))
        ids.append(token_id)
        state.advance(token_id)
        assert len(ids) < 10_000
    return ids


def text_of(tokenizer: Tokenizer, ids: list[int]) -> str:
    return b"".join(tokenizer.token_bytes(i) for i in ids).decode()


@pytest.mark.parametrize("name", FORMATS)
def test_every_walk_spells_a_legal_answer(tokenizer: Tokenizer, name: str) -> None:
    answer_format = FORMATS[name]
    grammar = AnswerGrammar(tokenizer, answer_format, 50, tokenizer.eos_ids)
    seen = set()
    for seed in range(60):
        rng = random.Random(seed)
        reasoning = tokenizer.encode_text("So 3 < 5; it says <answer>9</answer>, hm.", continued=True)
        ids = walk(
            grammar.start().fork(), rng, reasoning[: rng.randint(0, len(reasoning))], RandomModel(seed)
        )
        text = text_of(tokenizer, ids)
        state = grammar.start()
        for token_id in ids:
            state.advance(token_id)
        assert state.finished()
        tail = re.fullmatch(r"<think>\n.*\n</think>\n\n((?:<answer>[^<]*</answer>)+)", text, re.DOTALL)
        assert tail, text
        parsed = answer_format.parse(text)
        assert parsed is not None, text
        seen.add(parsed.values)
    assert len(seen) > min(3, len(answer_format.scale.values))


@pytest.mark.parametrize("name", FORMATS)
def test_the_answer_is_what_the_text_says(tokenizer: Tokenizer, name: str) -> None:
    grammar = AnswerGrammar(tokenizer, FORMATS[name], 0, frozenset())
    for seed in range(30):
        state = grammar.start()
        assert state.result() is None
        text = text_of(tokenizer, walk(state, random.Random(seed), [], RandomModel(seed)))
        answer, parsed = state.result(), FORMATS[name].parse(text)
        assert answer is not None
        assert parsed is not None
        assert answer.values == parsed.values
        assert text.startswith("<answer>")


def _paths(state: AnswerState, before: tuple[int, ...], slot: int) -> Iterator[tuple[AnswerState, list[Any]]]:
    """Every way through one slot: the state behind it, and the (place, options, token) of each choice."""
    stack: list[tuple[AnswerState, tuple[int, ...], list[Any]]] = [(state, before, [])]
    while stack:
        here, ids, choices = stack.pop()
        if len(here._values) > slot:
            yield here, choices
            continue
        options = list(here.forced()[:1]) or list(here.allowed() or ())
        for token_id in options:
            after = here.fork()
            after.advance(token_id)
            stack.append((after, (*ids, token_id), [*choices, (ids, options, token_id)]))


@pytest.mark.parametrize("name", [n for n in FORMATS if not n.startswith("rank")])
def test_score_probs_are_the_odds_of_sampling_under_the_grammar(tokenizer: Tokenizer, name: str) -> None:
    """Against an enumeration of all paths, each token's odds taken among the legal ones at its place."""
    model = RandomModel(1)
    state = AnswerGrammar(tokenizer, FORMATS[name], 0, frozenset()).start()
    expected: dict[str, float] = {}
    ids: list[int] = []
    while state.slot_start() is None:
        token_id = state.forced()[0]
        ids.append(token_id)
        state.advance(token_id)
    for after, choices in _paths(state.fork(), tuple(ids), 0):
        p = 1.0
        for place, options, token_id in choices:
            p *= math.exp(model(place, token_id)) / sum(math.exp(model(place, o)) for o in options)
        value = after._values[0]
        assert value not in expected
        expected[value] = p
    watch_slot(state, tuple(ids), model)
    while not state.finished():
        if state.slot_start():  # a later slot
            watch_slot(state, tuple(ids), RandomModel(2))
        state.advance((list(state.forced()) or list(state.allowed() or ()))[0])
    answer = state.result()
    assert answer is not None
    legal = CHOICES if FORMATS[name].kind == "choice" else FORMATS[name].scale.values
    assert tuple(answer.score_probs[0]) == legal
    assert answer.score_probs[0] == pytest.approx(expected)
    assert sum(expected.values()) == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["rank", "rank-all", "rank-decimals"])
def test_a_rank_never_gives_one_score_twice_but_weighs_all(tokenizer: Tokenizer, name: str) -> None:
    grammar = AnswerGrammar(tokenizer, FORMATS[name], 0, frozenset())
    for seed in range(20):
        state = grammar.start()
        walk(state, random.Random(seed), [], RandomModel(seed))
        answer = state.result()
        assert answer is not None
        assert len({float(v) for v in answer.values}) == FORMATS[name].num_responses
        for probs in answer.score_probs:
            assert set(probs) == set(FORMATS[name].scale.values)
            assert sum(probs.values()) == pytest.approx(1.0)


@pytest.mark.parametrize("name", FORMATS)
def test_answers_are_written_as_the_tokenizer_itself_writes_them(tokenizer: Tokenizer, name: str) -> None:
    grammar = AnswerGrammar(tokenizer, FORMATS[name], 0, frozenset())
    for seed in range(20):
        ids = walk(grammar.start(), random.Random(seed), [], RandomModel(seed))
        assert ids == tokenizer.encode_text(text_of(tokenizer, ids), continued=True)


def test_forced_closing_is_canonical_on_a_real_checkpoint(smollm2_path: Any) -> None:
    ours = from_gguf(smollm2_path).ours
    for answer_format in FORMATS.values():
        grammar = AnswerGrammar(ours, answer_format, None, ours.eos_ids)
        ids = walk(grammar.start(), random.Random(1), ours.encode_text("It is right."), RandomModel(1))
        assert ids == ours.encode_text(text_of(ours, ids))


def test_probes_of_whole_numbers_and_decimals() -> None:
    ours = qwen().ours  # writes every digit as a token of its own
    one, two, dot = ours.encode_text("1") + ours.encode_text("2") + ours.encode_text(".")

    def probes(name: str) -> set[tuple[int, ...]]:
        state = AnswerGrammar(ours, FORMATS[name], 0, frozenset()).start()
        while state.slot_start() is None:
            state.advance(state.forced()[0])
        assert all(p.slot == 0 for p in state.probes())
        return {p.prefix for p in state.probes()}

    assert probes("score") == {(one,)}
    assert probes("score-5") == set()
    assert (two, dot) in probes("decimals")
    assert (two,) not in probes("decimals")  # on the way to the longer one
    for path, other in itertools.permutations(probes("decimals"), 2):
        assert path != other[: len(path)]


def spend(state: AnswerState, rng: random.Random) -> int:
    """Close the reasoning and count the tokens to the end."""
    state.close()
    count = 0
    while not state.finished():
        forced = state.forced()
        state.advance(forced[0] if forced else rng.choice(list(state.allowed() or ())))
        count += 1
    return count


@pytest.mark.parametrize("name", FORMATS)
def test_reserve_is_never_too_small(tokenizer: Tokenizer, name: str) -> None:
    grammar = AnswerGrammar(tokenizer, FORMATS[name], None, frozenset())
    reasoning = tokenizer.encode_text("ok </think> x", continued=True)
    for seed in range(10):
        rng, state = random.Random(seed), grammar.start()
        free = list(reasoning)
        while not state.finished():
            worst = max(spend(state.fork(), rng) for _ in range(4))
            assert worst <= state.reserve()
            forced, allowed = state.forced(), state.allowed()
            state.advance(
                forced[0] if forced else free.pop(0) if allowed is None else rng.choice(list(allowed))
            )
        assert state.reserve() == 0


@pytest.mark.parametrize(
    ("written", "reasoning"),
    [
        ("fine</think>", "fine"),
        ("fine\n</think>\n", "fine"),
        ("fine</think>\n\n", "fine"),
        ("</think>", ""),
        ("a </thin k> b </think>", "a </thin k> b"),
        ("a <think> b</think>", "a <think> b"),
        ("é日本🎉</think>", "é日本🎉"),
    ],
)
def test_the_model_closes_its_reasoning_itself(tokenizer: Tokenizer, written: str, reasoning: str) -> None:
    for name in ("score", "choice", "pair"):
        state = AnswerGrammar(tokenizer, FORMATS[name], None, tokenizer.eos_ids).start()
        free = tokenizer.encode_text(written, continued=True)
        ids = walk(state, random.Random(1), list(free), RandomModel(1))
        text = text_of(tokenizer, ids)
        assert state.think_text() == reasoning
        behind = text.partition("</think>")[2]
        assert re.fullmatch(r"\s+(<answer>[^<]*</answer>)+", behind), text
        assert text.count("</think>") == 1


@pytest.mark.parametrize(
    "rest", ["", "\n", "\n\n", " ", "<", "<ans", "\n<", "\n<answer", "x", "<x", "<answer>3"]
)
def test_whatever_the_closing_token_brings_along(rest: str) -> None:
    """Some vocabularies hold one token for `</think>` and what follows it."""

    class Glued:
        """Token 10**6 reads `</think>` and the rest; all else is the real tokenizer's."""

        def __init__(self) -> None:
            self.real = qwen().ours
            self.control_ids = self.real.control_ids

        def encode_text(self, text: str, *, continued: bool = False) -> list[int]:
            return self.real.encode_text(text, continued=continued)

        def token_bytes(self, token_id: int) -> bytes:
            return b"</think>" + rest.encode() if token_id == 10**6 else self.real.token_bytes(token_id)

    glued: Any = Glued()
    state = AnswerGrammar(glued, FORMATS["score"], None, frozenset()).start()
    text = text_of(glued, walk(state, random.Random(1), [10**6], RandomModel(1)))
    answer = state.result()
    assert answer is not None
    assert text.endswith(f"<answer>{answer.values[0]}</answer>")
    if rest.strip() and "<answer>".startswith(rest.strip()):
        assert text == f"<think>\n</think>{rest[: rest.index('<')]}<answer>{answer.values[0]}</answer>"


def test_the_think_budget_closes_the_reasoning(tokenizer: Tokenizer) -> None:
    free = tokenizer.encode_text("a b c d e f g h i j", continued=True)
    for budget in (1, 3, 7):
        state = AnswerGrammar(tokenizer, FORMATS["score"], budget, tokenizer.eos_ids).start()
        left = list(free)
        walk(state, random.Random(0), left, RandomModel(0))
        assert len(free) - len(left) == budget
        assert state.result() is not None


def test_control_tokens_are_banned_but_for_the_stop_ids() -> None:
    ours = qwen().ours
    grammar = AnswerGrammar(ours, FORMATS["score"], None, ours.eos_ids)
    assert set(grammar.start().banned()) == ours.control_ids - ours.eos_ids
    state = grammar.start()
    while not state.finished():
        forced, allowed = state.forced(), state.allowed()
        assert ours.control_ids.isdisjoint([*forced, *(allowed or ())])
        if not forced and allowed is None:
            state.close()
        else:
            state.advance((list(forced) or list(allowed or ()))[0])


def test_a_fork_goes_its_own_way(tokenizer: Tokenizer) -> None:
    grammar = AnswerGrammar(tokenizer, FORMATS["rank"], None, tokenizer.eos_ids)
    parent = grammar.start()
    for token_id in [*parent.forced(), *tokenizer.encode_text("a b", continued=True)]:
        parent.advance(token_id)
    children = [parent.fork() for _ in range(3)]
    for seed, child in enumerate(children):
        reasoning = tokenizer.encode_text(f" child{seed}", continued=True)
        walk(child, random.Random(seed), reasoning, RandomModel(seed))
    assert parent.think_text() == "a b"
    assert not parent.finished()
    assert len({child.think_text() for child in children}) == 3
    assert len({child.result().values for child in children if child.result()}) > 1  # type: ignore[union-attr]
