"""Keeps encoder embeddings by content key: in memory within a budget, behind that in an optional folder."""

from collections import OrderedDict

import torch

from flexjudge_fast.engine.encoder_store import EncoderStore


class EncoderCache:
    """Content key to embeddings [num_tokens, hidden], least recently used out first.

    Used under the engine's lock. A key is a cryptographic digest of everything that the embeddings depend on,
    so equal keys mean equal embeddings. Every `get` counts once: as `num_hits` (memory), `num_store_hits`
    (folder) or `num_misses`.

    Args:
        max_bytes: bound on the embeddings in memory; 0 keeps none there.
        store: where embeddings outlive the process; None for memory only.
    """

    def __init__(self, max_bytes: int, store: EncoderStore | None = None) -> None:
        self.max_bytes = max_bytes
        self.store = store
        self.num_bytes = 0
        self.num_hits = 0
        self.num_store_hits = 0
        self.num_misses = 0
        self._entries: OrderedDict[bytes, torch.Tensor] = OrderedDict()  # next to evict first

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: bytes) -> torch.Tensor | None:
        """The embeddings, not to be written to, or None; on the CPU if they come from the folder."""
        kept = self._entries.get(key)
        if kept is not None:
            self._entries.move_to_end(key)
            self.num_hits += 1
            return kept
        stored = self.store.get(key) if self.store is not None else None
        if stored is None:
            self.num_misses += 1
            return None
        self.num_store_hits += 1
        self._keep(key, stored)
        return stored

    def put(self, key: bytes, embeddings: torch.Tensor) -> None:
        """Keep `embeddings`, which nobody may write to from now on.

        What is larger than the whole budget isn't kept in memory, but goes to the folder.
        """
        self._keep(key, embeddings.detach())
        if self.store is not None:
            self.store.put(key, embeddings)

    def check_integrity(self) -> None:
        """Raise AssertionError unless the bytes counted are those kept, and within the budget."""
        kept = sum(embeddings.untyped_storage().nbytes() for embeddings in self._entries.values())
        if kept != self.num_bytes or kept > self.max_bytes:
            raise AssertionError(f"{kept} bytes kept, {self.num_bytes} counted, {self.max_bytes} allowed")

    def _keep(self, key: bytes, embeddings: torch.Tensor) -> None:
        """Put into memory as the most recently used, evicting others until it fits."""
        replaced = self._entries.pop(key, None)
        if replaced is not None:
            self.num_bytes -= replaced.nbytes
        if embeddings.nbytes > self.max_bytes:
            return
        while self.num_bytes + embeddings.nbytes > self.max_bytes:
            _, evicted = self._entries.popitem(last=False)
            self.num_bytes -= evicted.nbytes
        if embeddings.untyped_storage().nbytes() != embeddings.nbytes:
            embeddings = embeddings.clone()  # a slice would keep the embeddings of its whole batch alive
        self._entries[key] = embeddings
        self.num_bytes += embeddings.nbytes
