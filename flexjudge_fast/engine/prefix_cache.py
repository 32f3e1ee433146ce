"""Finds KV blocks already computed for a prefix, by chained content digest, down to the token."""

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

ROOT = b"\0" * 32  # the parent of a first block


@dataclass(frozen=True)
class BlockContent:
    """What a full block holds; equal contents have equal keys and values.

    `media_keys` are the content keys of media whose placeholders lie in the block.
    """

    parent: bytes
    token_ids: tuple[int, ...]
    media_keys: tuple[bytes, ...] = ()

    def digest(self) -> bytes:
        """BLAKE2b-256 over parent, token ids and media keys, each with its length."""
        h = hashlib.blake2b(self.parent, digest_size=32)
        h.update(len(self.token_ids).to_bytes(4, "little"))
        h.update(array("q", self.token_ids).tobytes())
        for key in self.media_keys:
            h.update(len(key).to_bytes(4, "little") + key)
        return h.digest()


@dataclass(frozen=True)
class PrefixMatch:
    """The longest computed prefix: whole blocks, then `partial_len` tokens at the start of one more."""

    block_ids: tuple[int, ...] = ()
    partial_block: int | None = None
    partial_len: int = 0


class PrefixCache:
    """Digest to block id, with contents compared on every hit."""

    def __init__(self) -> None:
        self._by_digest: dict[bytes, int] = {}
        self._contents: dict[int, tuple[bytes, BlockContent]] = {}
        self._children: dict[bytes, dict[int, None]] = {}

    def __contains__(self, block_id: int) -> bool:
        return block_id in self._contents

    def __len__(self) -> int:
        return len(self._contents)

    def insert(self, block_id: int, digest: bytes, content: BlockContent) -> None:
        """Make a computed full block findable; the first block of equal content stays."""
        if digest in self._by_digest or block_id in self._contents:
            return
        self._by_digest[digest] = block_id
        self._contents[block_id] = (digest, content)
        self._children.setdefault(content.parent, {})[block_id] = None

    def evict(self, block_id: int) -> None:
        """Forget a block that is about to be overwritten; does nothing for one that isn't cached."""
        entry = self._contents.pop(block_id, None)
        if entry is None:
            return
        digest, content = entry
        del self._by_digest[digest]
        siblings = self._children[content.parent]
        del siblings[block_id]
        if not siblings:
            del self._children[content.parent]

    def find(self, digest: bytes, content: BlockContent) -> int | None:
        """The block of this digest, if its content is equal too."""
        block_id = self._by_digest.get(digest)
        if block_id is None or self._contents[block_id][1] != content:
            return None
        return block_id

    def longest_start(
        self, parent: bytes, token_ids: Sequence[int], media_keys: tuple[bytes, ...] = ()
    ) -> tuple[int | None, int]:
        """Among the blocks under `parent`: the one sharing most leading tokens, and how many."""
        best: int | None = None
        best_len = 0
        for block_id in self._children.get(parent, ()):
            content = self._contents[block_id][1]
            if content.media_keys != media_keys:
                continue
            shared = common_prefix_len(content.token_ids, token_ids)
            if shared > best_len:
                best, best_len = block_id, shared
        return best, best_len

    def check_integrity(self) -> None:
        """Raise AssertionError unless the three tables say the same."""
        by_digest = {digest: block_id for block_id, (digest, _) in self._contents.items()}
        children: dict[bytes, set[int]] = {}
        for block_id, (_, content) in self._contents.items():
            children.setdefault(content.parent, set()).add(block_id)
        if by_digest != self._by_digest or children != {p: set(c) for p, c in self._children.items()}:
            raise AssertionError("the prefix cache's tables disagree")


def common_prefix_len(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading items are equal."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
