"""The grammar of a judgement's output, token by token: free reasoning, then exactly a legal answer."""

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import partial

from flexjudge_fast.prompts.formats import THINK_CLOSE, THINK_OPEN, Answer, AnswerFormat, Slot
from flexjudge_fast.prompts.tokenizer import Tokenizer

_OPENING = THINK_OPEN + "\n"
_LEAD = "\n\n"  # between the reasoning and the answer
_CLOSING = "\n" + THINK_CLOSE + _LEAD


@dataclass(frozen=True)
class Probe:
    """Tokens to force after a slot's start; the distribution after each of them is wanted."""

    slot: int
    prefix: tuple[int, ...]


@dataclass(eq=False)
class TrieNode:
    """A place inside a value: the tokens that lead on, the value that ends here, all values from here."""

    children: dict[int, "TrieNode"] = field(default_factory=dict)
    value: str | None = None
    below: set[str] = field(default_factory=set)

    def walk(self, prefix: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], "TrieNode"]]:
        yield prefix, self
        for token_id, child in self.children.items():
            yield from child.walk((*prefix, token_id))


@dataclass(frozen=True)
class CompiledSlot:
    """A slot's values as a trie over tokens; `end` is the token that follows a value."""

    slot: Slot
    root: TrieNode
    end: int
    longest: int
    probe_paths: tuple[tuple[int, ...], ...]

    def branches(self, node: TrieNode) -> list[int]:
        """The tokens that may come at `node`, when no value is taken yet."""
        return [*node.children, *([self.end] if node.value is not None else [])]


class AnswerGrammar:
    """`<think>`, free text, `</think>`, then the format's literals and values. Shared by all samples.

    Values are told apart by the token after them, so that 1 and 10 are two answers. Every sequence of
    tokens that the grammar admits spells a legal answer.

    Args:
        max_think_tokens: the reasoning is closed after so many tokens; 0 asks for the answer at once.
        stop_ids: tokens by which the model says that it is done; they close the reasoning.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        answer_format: AnswerFormat,
        max_think_tokens: int | None,
        stop_ids: frozenset[int],
    ) -> None:
        self.tokenizer = tokenizer
        self.format = answer_format
        self.max_think_tokens = max_think_tokens
        self.banned = tuple(sorted(tokenizer.control_ids - stop_ids))
        parts = answer_format.parts()
        self.first_literal = str(parts[0])
        encode = partial(tokenizer.encode_text, continued=True)
        self.opening = encode(_OPENING)
        self.closing = encode(_CLOSING + self.first_literal)
        self.literals = [encode(part) for part in parts if isinstance(part, str)]
        slots = [part for part in parts if isinstance(part, Slot)]
        tries = {slot: _build_trie(tokenizer, slot) for slot in set(slots)}
        self.slots = [
            CompiledSlot(slot, tries[slot], self.literals[i + 1][0], _depth(tries[slot]), _paths(tries[slot]))
            for i, slot in enumerate(slots)
        ]

    def start(self) -> "AnswerState":
        """The state before the first generated token."""
        return AnswerState(self)


class AnswerState:
    """Where one sample stands. The engine calls; see `Request` for the order of the calls."""

    def __init__(self, grammar: AnswerGrammar) -> None:
        self._grammar = grammar
        self._thinking = grammar.max_think_tokens != 0
        self._think = bytearray()
        self._num_think = 0
        self._slot = -1  # the slot whose literal is being forced comes next
        self._node: TrieNode | None = None
        self._values: list[str] = []
        self._seen: dict[tuple[int, tuple[int, ...]], dict[int, float]] = {}
        self._queue = deque(grammar.opening if self._thinking else grammar.literals[0])  # to be forced

    def fork(self) -> "AnswerState":
        """An independent copy."""
        other = copy(self)
        other._think = bytearray(self._think)
        other._values = list(self._values)
        other._seen = dict(self._seen)
        other._queue = deque(self._queue)
        return other

    def finished(self) -> bool:
        return self._slot == len(self._grammar.slots) and not self._queue

    def forced(self) -> Sequence[int]:
        """Tokens that must come next; empty where there is a choice. A slot's first token is never forced,
        so that its distribution is always read."""
        if self._queue:
            return tuple(self._queue)
        if self._node is not None and self._node is not self._current.root:
            options = self._options(self._node)
            return tuple(options) if len(options) == 1 else ()
        return ()

    def allowed(self) -> Sequence[int] | None:
        """The only tokens that may come next; `None` while the model reasons freely."""
        return None if self._node is None else self._options(self._node)

    def banned(self) -> tuple[int, ...]:
        """Control tokens, which never come while the model reasons freely."""
        return self._grammar.banned

    def advance(self, token_id: int) -> None:
        """Take the next token, forced or sampled."""
        if self._queue:
            self._queue.popleft()
            if not self._queue and not self._thinking:
                self._enter_slot()
        elif self._thinking:
            self._advance_think(token_id)
        else:
            self._advance_value(token_id)

    def close(self) -> None:
        """End the reasoning now: the answer must follow."""
        if self._thinking:
            self._thinking = False
            self._queue = deque(self._grammar.closing)

    def reserve(self) -> int:
        """The most tokens that are still to come if the reasoning is closed now."""
        grammar = self._grammar
        rest = len(grammar.closing) if self._thinking else len(self._queue)
        for i in range(max(self._slot + (self._node is None), 0), len(grammar.slots)):
            rest += grammar.slots[i].longest + len(grammar.literals[i + 1])
        return rest + (len(self._queue) if self._thinking else 0)

    def slot_start(self) -> int | None:
        """The number of the slot whose first token comes next, if so."""
        return self._slot if self._node is not None and self._node is self._current.root else None

    def probes(self) -> list[Probe]:
        """Paths that together reach every branching place of the current slot's trie but its root."""
        return [Probe(self._slot, path) for path in self._current.probe_paths]

    def watch(self, slot: int, prefix: tuple[int, ...]) -> Sequence[int]:
        """The tokens whose log-probabilities are wanted after `prefix`; empty where there is no choice."""
        compiled = self._grammar.slots[slot]
        node = compiled.root
        for token_id in prefix:
            node = node.children[token_id]
        options = compiled.branches(node)
        return options if len(options) > 1 else ()

    def observe(self, slot: int, prefix: tuple[int, ...], logprobs: Mapping[int, float]) -> None:
        """Take the model's log-probabilities of the watched tokens after `prefix`."""
        self._seen[slot, prefix] = dict(logprobs)

    def result(self) -> Answer | None:
        """The answer, with the distribution of each slot; `None` before it is complete."""
        if not self.finished():
            return None
        probs = tuple(self._distribution(i) for i in range(len(self._grammar.slots)))
        return Answer(tuple(self._values), probs)

    def think_text(self) -> str:
        """The reasoning, without its tags."""
        return self._think.partition(THINK_CLOSE.encode())[0].decode("utf-8", errors="replace").strip()

    @property
    def _current(self) -> CompiledSlot:
        return self._grammar.slots[self._slot]

    def _advance_think(self, token_id: int) -> None:
        tag = THINK_CLOSE.encode()
        searched = max(len(self._think) - len(tag) + 1, 0)  # the tag may have begun in earlier tokens
        self._think += self._grammar.tokenizer.token_bytes(token_id)
        self._num_think += 1
        at = self._think.find(tag, searched)
        if at >= 0:
            rest = bytes(self._think[at + len(tag) :])
            self._thinking = False
            self._queue = deque(self._grammar.tokenizer.encode_text(self._lead_after(rest), continued=True))
        elif self._num_think == self._grammar.max_think_tokens:
            self.close()

    def _lead_after(self, rest: bytes) -> str:
        """What is missing up to the first slot, when the token that closed the tag brought `rest` along."""
        literal, text = self._grammar.first_literal, rest.decode("utf-8", errors="replace")
        begun = text.lstrip()
        if literal.startswith(begun) and literal != begun:
            return literal[len(begun) :] if text else _LEAD + literal
        return _LEAD + literal

    def _advance_value(self, token_id: int) -> None:
        node = self._node
        assert node is not None
        if token_id in node.children:
            self._node = node = node.children[token_id]
            if not node.children:
                self._take_value(node, 0)
        else:
            self._take_value(node, 1)  # the token was the first of the literal that follows

    def _take_value(self, node: TrieNode, consumed: int) -> None:
        assert node.value is not None
        self._values.append(node.value)
        self._node = None
        self._queue = deque(self._grammar.literals[self._slot + 1][consumed:])
        if not self._queue:
            self._enter_slot()

    def _enter_slot(self) -> None:
        self._slot += 1
        self._node = None if self._slot == len(self._grammar.slots) else self._current.root

    def _options(self, node: TrieNode) -> list[int]:
        """What may come at `node`, without the values that a rank has given away."""
        taken = {float(v) for v in self._values} if self._current.slot.distinct else set()

        def is_open(value: str) -> bool:
            return not taken or float(value) not in taken

        options = [t for t, child in node.children.items() if any(is_open(v) for v in child.below)]
        if node.value is not None and is_open(node.value):
            options.append(self._current.end)
        return options

    def _distribution(self, slot: int) -> dict[str, float]:
        """Probability of each value: the product of its tokens', each among the legal ones at its place."""
        compiled = self._grammar.slots[slot]
        probs: dict[str, float] = {}

        def descend(node: TrieNode, prefix: tuple[int, ...], p: float) -> None:
            options = compiled.branches(node)
            share = _normalised(self._seen[slot, prefix]) if len(options) > 1 else {options[0]: 1.0}
            for token_id, child in node.children.items():
                descend(child, (*prefix, token_id), p * share[token_id])
            if node.value is not None:
                probs[node.value] = p * share[compiled.end]

        descend(compiled.root, (), 1.0)
        return {value: probs[value] for value in compiled.slot.values}


def _normalised(logprobs: Mapping[int, float]) -> dict[int, float]:
    top = max(logprobs.values())
    weights = {token_id: math.exp(lp - top) for token_id, lp in logprobs.items()}
    total = sum(weights.values())
    return {token_id: weight / total for token_id, weight in weights.items()}


def _build_trie(tokenizer: Tokenizer, slot: Slot) -> TrieNode:
    root = TrieNode()
    for value in slot.values:
        node = root
        node.below.add(value)
        for token_id in tokenizer.encode_text(value, continued=True):
            node = node.children.setdefault(token_id, TrieNode())
            node.below.add(value)
        node.value = value
    return root


def _paths(root: TrieNode) -> tuple[tuple[int, ...], ...]:
    """Paths to the branching places below the root; one that a longer path passes by is left out."""
    branching = [
        prefix for prefix, node in root.walk() if prefix and len(node.children) + (node.value is not None) > 1
    ]
    passed = {path[:length] for path in branching for length in range(1, len(path))}
    return tuple(path for path in branching if path not in passed)


def _depth(node: TrieNode) -> int:
    return max(len(prefix) for prefix, _ in node.walk())
