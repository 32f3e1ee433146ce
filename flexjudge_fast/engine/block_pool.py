"""Who owns which KV block: allocation, reference counts, and LRU reuse of blocks the prefix cache knows."""

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from flexjudge_fast.engine.prefix_cache import PrefixCache


class BlockPool:
    """`num_blocks` equal blocks. A block is free when nobody references it.

    A free block may still hold a cached prefix; it is then reused last, least recently used first.
    """

    def __init__(self, num_blocks: int, cache: PrefixCache) -> None:
        self.num_blocks = num_blocks
        self.cache = cache
        self.ref_counts = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # next to reuse first

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def allocate(self) -> int:
        """A block with one reference. The caller has checked `num_free`."""
        block_id, _ = self._free.popitem(last=False)
        self.cache.evict(block_id)
        self.ref_counts[block_id] = 1
        return block_id

    def share(self, block_ids: Iterable[int]) -> None:
        """Add a reference to each block; a free cached block comes back into use."""
        for block_id in block_ids:
            if self.ref_counts[block_id] == 0:
                del self._free[block_id]
            self.ref_counts[block_id] += 1

    def release(self, block_ids: Sequence[int]) -> None:
        """Drop a reference from each block of a table, last block first so that prefixes outlive tails."""
        for block_id in reversed(block_ids):
            if self.ref_counts[block_id] <= 0:
                raise AssertionError(f"block {block_id} is released more often than it is referenced")
            self.ref_counts[block_id] -= 1
            if self.ref_counts[block_id] == 0:
                self._free[block_id] = None
                if block_id not in self.cache:
                    self._free.move_to_end(block_id, last=False)

    def is_shared(self, block_id: int) -> bool:
        return self.ref_counts[block_id] > 1

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Raise AssertionError unless the counts equal the references that `tables` hold."""
        counts = [0] * self.num_blocks
        for table in tables:
            for block_id in table:
                counts[block_id] += 1
        if counts != self.ref_counts:
            wrong = [i for i in range(self.num_blocks) if counts[i] != self.ref_counts[i]]
            raise AssertionError(f"reference counts have drifted for blocks {wrong[:8]}")
        if set(self._free) != {i for i, count in enumerate(counts) if count == 0}:
            raise AssertionError("the free list does not equal the blocks without references")
        self.cache.check_integrity()
