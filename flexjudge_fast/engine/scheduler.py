"""Packs requests into one batch per step: decode tokens and prompt chunks side by side, over paged blocks."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace

from flexjudge_fast.engine.batch import Batch, Chunk
from flexjudge_fast.engine.block_pool import BlockPool
from flexjudge_fast.engine.prefix_cache import (
    ROOT,
    BlockContent,
    PrefixCache,
    PrefixMatch,
    common_prefix_len,
)
from flexjudge_fast.engine.request import Request


@dataclass(frozen=True)
class SchedulerLimits:
    """Tokens per block and per step, sequences at once, and whether prefixes are reused."""

    block_size: int
    max_batched_tokens: int
    max_num_seqs: int
    prefix_caching: bool = True


class Scheduler:
    """Decides what runs next. Touches token ids and block numbers, never a device.

    `waiting` requests may already hold blocks (samples forked from a running one); `running` ones do.
    """

    def __init__(self, limits: SchedulerLimits, num_blocks: int) -> None:
        self.limits = limits
        self.cache = PrefixCache()
        self.pool = BlockPool(num_blocks, self.cache)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.num_preemptions = 0
        self.num_prompt_tokens = 0
        self.num_cached_tokens = 0  # of the prompt tokens, found in the prefix cache
        # Full blocks, by parent, that this step computes, and those of the step that is under way.
        self._pending: dict[bytes, list[BlockContent]] = {}
        self._under_way: dict[bytes, list[BlockContent]] = {}
        self._copies: list[tuple[int, int]] = []
        self._chunks: list[Chunk] = []

    def add(self, request: Request, front: bool = False) -> None:
        """Queue a request; forks go to the front, since they hold blocks."""
        if front:
            self.waiting.appendleft(request)
        else:
            self.waiting.append(request)

    def share_blocks(self, parent: Request, child: Request) -> None:
        """Give a fork its parent's computed blocks; the first to write into a shared one copies it."""
        child.block_table = list(parent.block_table)
        self.pool.share(child.block_table)

    def remove(self, request: Request) -> None:
        """Take a finished or cancelled request out and release its blocks."""
        if request in self.running:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        self._release(request)

    def schedule(self) -> Batch:
        """The next step, where none is under way. Empty when nothing can run."""
        self._under_way, self._pending, self._copies, self._chunks = {}, {}, [], []
        budget = self.limits.max_batched_tokens
        for request in list(self.running):
            if budget == 0:
                break
            if request.block_table and self._make_room(request, budget):
                budget -= self._add(_next_chunk(request, budget))
        return self._admit(budget)

    def schedule_ahead(self, following: Mapping[Request, Chunk | None]) -> Batch | None:
        """The step behind one that is still under way; nobody is preempted for it.

        Args:
            following: what each request of that step goes on with, whatever that gives; `None` for one that
                must wait for what it gives.

        Returns:
            What those go on with and what else can run, the oldest first. `None` if blocks are missing.
        """
        planned: list[Chunk] = []
        budget = self.limits.max_batched_tokens
        for request in self.running:
            chunk = following[request] if request in following else _next_chunk(request, budget)
            if chunk is not None and budget:
                planned.append(chunk if chunk.num_tokens <= budget else replace(chunk, num_tokens=budget))
                budget -= planned[-1].num_tokens
        if sum(sum(self._missing(chunk)) for chunk in planned) > self.pool.num_free:
            return None
        self._under_way, self._pending, self._copies, self._chunks = self._pending, {}, [], []
        for chunk in planned:
            self._grow(chunk)
            self._add(chunk)
        return self._admit(budget)

    def commit(self, batch: Batch) -> None:
        """The step has run: its tokens are computed and its full blocks can be found."""
        for chunk in batch.chunks:
            request = chunk.request
            first = request.num_computed // self.limits.block_size
            request.num_computed = chunk.end
            if not self.limits.prefix_caching:
                continue
            digests = request.extend_digests(self.limits.block_size)
            for index in range(first, chunk.end // self.limits.block_size):
                content = request.block_content(index, self.limits.block_size)
                self.cache.insert(request.block_table[index], digests[index], content)

    def preempt(self, request: Request) -> None:
        """Release a request's blocks; it starts over (from what the prefix cache still holds) later."""
        self.num_preemptions += 1
        request.num_preemptions += 1
        self._release(request)
        request.num_computed = 0
        if request in self.running:
            self.running.remove(request)
            self.waiting.appendleft(request)

    def check_integrity(self) -> None:
        """Raise AssertionError if any block is leaked or counted wrong."""
        self.pool.check_integrity(r.block_table for r in [*self.running, *self.waiting])

    def _release(self, request: Request) -> None:
        self.pool.release(request.block_table)
        request.block_table = []

    def _add(self, chunk: Chunk) -> int:
        """To this step, with the blocks that it fills, if their tokens are known. Returns its tokens."""
        self._chunks.append(chunk)
        request, size = chunk.request, self.limits.block_size
        if self.limits.prefix_caching and chunk.end <= len(request.token_ids):
            request.extend_digests(size)
            for index in range(chunk.start // size, chunk.end // size):
                content = request.block_content(index, size)
                self._pending.setdefault(content.parent, []).append(content)
        return chunk.num_tokens

    def _make_room(self, request: Request, budget: int) -> bool:
        """Blocks for the next tokens of a running request, preempting the youngest others if need be."""
        while not self._grow(_next_chunk(request, budget)):
            victim = self._victim(request)
            if victim is None:
                self.preempt(request)
                return False
            self.preempt(victim)
        return True

    def _victim(self, keep: Request) -> Request | None:
        """Who loses its blocks: a waiting fork first, else the youngest running one not in this step."""
        planned = {chunk.request.id for chunk in self._chunks} | {keep.id}
        for request in [*reversed(self.waiting), *reversed(self.running)]:
            if request.block_table and request.id not in planned:
                return request
        return None

    def _missing(self, chunk: Chunk) -> tuple[int, bool]:
        """How many blocks its table lacks; whether the one it starts in is shared and must be copied."""
        table = chunk.request.block_table
        index, place = divmod(chunk.start, self.limits.block_size)
        must_copy = place != 0 and (self.pool.is_shared(table[index]) or table[index] in self.cache)
        return max(0, -(-chunk.end // self.limits.block_size) - len(table)), must_copy

    def _grow(self, chunk: Chunk) -> bool:
        """Extend the block table for a chunk and un-share the block it starts in. All or nothing."""
        num_new, must_copy = self._missing(chunk)
        if num_new + must_copy > self.pool.num_free:
            return False
        table = chunk.request.block_table
        if must_copy:
            index = chunk.start // self.limits.block_size
            source, table[index] = table[index], self.pool.allocate()
            self._copies.append((source, table[index]))
            self.pool.release([source])
        table.extend(self.pool.allocate() for _ in range(num_new))
        return True

    def _admit(self, budget: int) -> Batch:
        """Move waiting requests into the batch, in order, while tokens, sequences and blocks last."""
        for request in list(self.waiting):
            if budget == 0 or len(self.running) >= self.limits.max_num_seqs:
                break
            holds_nothing = not request.block_table
            if holds_nothing and not self._reuse_prefix(request):
                continue  # what it needs is being computed at this moment: one step later it is there
            while not self._grow(_next_chunk(request, budget)):
                victim = None if self._chunks else self._victim(request)
                if victim is None:
                    if holds_nothing:
                        self._release(request)
                        request.num_computed = 0
                    return self._batch()
                self.preempt(victim)
            if request.num_cached is None:
                request.num_cached = request.num_computed
                self.num_prompt_tokens += len(request.prompt)
                self.num_cached_tokens += min(request.num_computed, len(request.prompt))
            self.waiting.remove(request)
            self.running.append(request)
            budget -= self._add(_next_chunk(request, budget))
        return self._batch()

    def _batch(self) -> Batch:
        return Batch(tuple(self._chunks), tuple(self._copies))

    def _reuse_prefix(self, request: Request) -> bool:
        """Start from the longest cached prefix. False if a longer one is being computed right now."""
        if not self.limits.prefix_caching or request.all_logits:
            return True
        match, parent, done = self._match(request)
        if self._is_pending(request, parent, done, match.partial_len):
            return False
        self.pool.share(match.block_ids)
        request.block_table = list(match.block_ids)
        request.num_computed = done
        if match.partial_block is not None:
            self.pool.share([match.partial_block])  # it is in the cache, so `_grow` copies it before writing
            request.block_table.append(match.partial_block)
            request.num_computed += match.partial_len
        return True

    def _match(self, request: Request) -> tuple[PrefixMatch, bytes, int]:
        """The longest computed prefix, the digest it ends in, and its length in whole blocks' tokens."""
        size, limit = self.limits.block_size, request.first_logit
        digests = request.extend_digests(size)
        block_ids: list[int] = []
        for index in range(min(len(digests), limit // size)):
            block_id = self.cache.find(digests[index], request.block_content(index, size))
            if block_id is None:
                break
            block_ids.append(block_id)
        done = len(block_ids) * size
        parent = digests[len(block_ids) - 1] if block_ids else ROOT
        rest = request.token_ids[done : min(done + size, limit)]
        partial, partial_len = self.cache.longest_start(parent, rest, request.media_in(done, done + size))
        return PrefixMatch(tuple(block_ids), partial, partial_len), parent, done

    def _is_pending(self, request: Request, parent: bytes, done: int, partial_len: int) -> bool:
        end = done + self.limits.block_size
        rest, media = request.token_ids[done : min(end, request.first_logit)], request.media_in(done, end)
        return any(
            content.media_keys == media and common_prefix_len(content.token_ids, rest) > partial_len
            for pending in (self._under_way, self._pending)
            for content in pending.get(parent, ())
        )


def _next_chunk(request: Request, budget: int) -> Chunk:
    """What of the request is not computed, up to `budget` tokens."""
    return Chunk(request, request.num_computed, min(request.num_uncomputed, budget))
