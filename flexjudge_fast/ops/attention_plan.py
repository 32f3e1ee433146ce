"""Who reads which part of the KV cache in a step of attention: the kernels' work lists, made on a host."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

_WIDTH = 4  # numbers of an entry in any list

Numbers = NDArray[np.int32]


@dataclass(frozen=True)
class Cut:
    """How the kernels of a layer want their work.

    group: query heads of a KV head; chunk: positions that are reduced by themselves, from a sequence's first
    on; decode_rows, prefill_rows: (token, head) pairs in one program's tile, at least `group`.
    """

    group: int
    chunk: int
    decode_rows: int
    prefill_rows: int


@dataclass(frozen=True)
class AttentionPlan:
    """`HostPlan` on a device. Lists are views of `buffer`: the plan of a captured graph can be overwritten.

    items, order, merges, tiles: [length, 4] int32, see `HostPlan`.
    """

    buffer: torch.Tensor
    items: torch.Tensor
    order: torch.Tensor
    merges: torch.Tensor
    tiles: torch.Tensor
    cut: Cut

    @property
    def has_decode(self) -> bool:
        return len(self.merges) > 0

    def copy_(self, plan: "HostPlan") -> None:
        """Take the numbers of another step, whose lists have the same lengths.

        Raises:
            ValueError: they have not.
        """
        if plan.lengths != tuple(len(x) for x in (self.items, self.order, self.merges, self.tiles)):
            raise ValueError("the plans' lists differ in length: give plan_attention the same limits")
        self.buffer.copy_(torch.from_numpy(plan.buffer))


@dataclass(frozen=True)
class HostPlan:
    """Work lists of four int32 numbers an entry.

    items: decode work, one program each and KV head: first entry in `order`, number of entries (0: nothing
        to do), chunk, 0. Its sequences have all blocks of the chunk in common, or it has one sequence.
    order: the sequences of the items: row of the block tables, row of the query, context length, place of
        the partial result.
    merges: one entry for each sequence: row of the query (-1: not a decode), first partial result, number
        of partial results, 0.
    tiles: prefill work: row of the block tables, first row of the query, number of tokens, keys that the
        first token sees. The others see one more each.
    """

    buffer: Numbers
    lengths: tuple[int, int, int, int]
    cut: Cut

    @property
    def items(self) -> Numbers:
        return self._lists()[0]

    @property
    def order(self) -> Numbers:
        return self._lists()[1]

    @property
    def merges(self) -> Numbers:
        return self._lists()[2]

    @property
    def tiles(self) -> Numbers:
        return self._lists()[3]

    def _lists(self) -> list[Numbers]:
        return np.split(self.buffer, np.cumsum(self.lengths)[:-1])

    def to(self, device: torch.device | str) -> AttentionPlan:
        """One copy to the device."""
        buffer = torch.from_numpy(self.buffer).to(device, non_blocking=True)
        items, order, merges, tiles = buffer.split(self.lengths)
        return AttentionPlan(buffer, items, order, merges, tiles, self.cut)


def attention_cuts(
    dtype: torch.dtype, kv_dtype: torch.dtype, block_size: int, heads: int, kv_heads: int, head_dim: int
) -> tuple[Cut, Cut]:
    """For a layer on the current device: sequences by themselves, and with blocks in common.

    Raises:
        ValueError: no kernel is for these.
    """
    from flexjudge_fast.kernels.attention_sizes import attention_sizes

    sizes = attention_sizes(dtype, kv_dtype, block_size, heads, kv_heads, head_dim)
    return sizes.cut, sizes.shared_cut


def plan_attention(
    query_start: NDArray[np.int64],
    context_lens: NDArray[np.int64],
    block_tables: NDArray[np.int64],
    block_size: int,
    cut: Cut,
    max_items: int | None = None,
) -> HostPlan:
    """Cut a step into programs. Sequences with one new token are decoded, those with more are prefill.

    Args:
        query_start: [num_seqs + 1] offsets into the query.
        context_lens: [num_seqs], new tokens included.
        block_tables: [num_seqs, max_blocks]; entries past a context are not looked at.
        max_items: length of the decode lists, at least the chunks of all decoded sequences; without it, they
            are as long as they must be.

    Raises:
        ValueError: `max_items` is too small, or a tile holds less than a group.
    """
    if min(cut.decode_rows, cut.prefill_rows) < cut.group:
        raise ValueError(f"a tile cannot hold a group: {cut}")
    starts, lens, tables = (np.asarray(x, dtype=np.int64) for x in (query_start, context_lens, block_tables))
    new = np.diff(starts)
    decoded = np.flatnonzero(new == 1)
    counts = -(-lens[decoded] // cut.chunk)
    firsts = np.cumsum(counts) - counts
    items, order = _decode_lists(decoded, lens, tables, block_size, counts, cut)
    order[:, 3] += firsts[order[:, 0]]
    order[:, 1:3] = np.stack((starts[:-1], lens), 1)[decoded[order[:, 0]]]
    order[:, 0] = decoded[order[:, 0]]
    merges = np.zeros((len(lens) if len(decoded) or max_items else 0, _WIDTH), np.int32)
    if len(merges):
        merges[:, 0] = -1
        merges[decoded, :3] = np.stack((starts[decoded], firsts, counts), 1)
    if max_items is not None:
        if max_items < len(order):
            raise ValueError(f"{len(order)} chunks to decode, max_items is {max_items}")
        items, order = (np.pad(x, ((0, max_items - len(x)), (0, 0))) for x in (items, order))
    tiles = _prefill_tiles(starts, lens, new, cut.prefill_rows // cut.group)
    lists = (items, order, merges, tiles)
    lengths = (len(items), len(order), len(merges), len(tiles))
    return HostPlan(np.concatenate(lists).astype(np.int32), lengths, cut)


def _decode_lists(
    decoded: NDArray[np.int64],
    lens: NDArray[np.int64],
    tables: NDArray[np.int64],
    block_size: int,
    counts: NDArray[np.int64],
    cut: Cut,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Items, and their order: [:, 0] an index into `decoded`, [:, 3] the chunk, the rest zeros."""
    most = cut.decode_rows // cut.group  # sequences that a program can hold
    total = int(counts.sum())
    which = np.repeat(np.arange(len(decoded)), counts)
    chunks = np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)
    order = np.zeros((total, _WIDTH), np.int64)
    items = np.zeros((0, _WIDTH), np.int64)
    if not total:
        return items, order
    begins = np.ones(total, dtype=bool)  # of items
    if most > 1 and len(decoded) > 1:
        blocks = _blocks_of_chunks(tables[decoded], which, chunks, block_size, cut.chunk)
        full = (chunks + 1) * cut.chunk <= lens[decoded[which]]
        odd = np.random.default_rng(0).integers(1, 2**62, blocks.shape[1]) * 2 + 1
        places = np.lexsort((which, (blocks * odd).sum(1), ~full, chunks))  # the same blocks come together
        which, chunks, full, blocks = which[places], chunks[places], full[places], blocks[places]
        same = (blocks[1:] == blocks[:-1]).all(1) & (chunks[1:] == chunks[:-1]) & full[1:] & full[:-1]
        runs = np.maximum.accumulate(np.where(np.append(True, ~same), np.arange(total), 0))
        begins = (np.arange(total) - runs) % most == 0
    order[:, 0], order[:, 3] = which, chunks
    first = np.flatnonzero(begins)
    items = np.zeros((len(first), _WIDTH), np.int64)
    items[:, 0], items[:, 1], items[:, 2] = first, np.diff(np.append(first, total)), chunks[first]
    return items, order


def _blocks_of_chunks(
    tables: NDArray[np.int64],
    which: NDArray[np.int64],
    chunks: NDArray[np.int64],
    block_size: int,
    chunk: int,
) -> NDArray[np.int64]:
    """[num_pairs, most blocks of a chunk]: the blocks with positions of each (sequence, chunk), and zeros."""
    begin, end = chunks * chunk // block_size, -(-(chunks + 1) * chunk // block_size)
    places = begin[:, None] + np.arange(int((end - begin).max()))
    inside = (places < end[:, None]) & (places < tables.shape[1])
    return np.where(inside, tables[which[:, None], np.where(inside, places, 0)], 0)


def _prefill_tiles(
    starts: NDArray[np.int64], lens: NDArray[np.int64], new: NDArray[np.int64], most: int
) -> NDArray[np.int64]:
    """Tiles of up to `most` tokens; those with most keys first, so that the longest do not start last."""
    several = np.flatnonzero(new > 1)
    counts = -(-new[several] // most)
    which = np.repeat(several, counts)
    at = (np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)) * most
    tiles = np.stack(
        (which, starts[which] + at, np.minimum(new[which] - at, most), lens[which] - new[which] + at + 1), 1
    )
    return tiles[np.argsort(-tiles[:, 3], kind="stable")]
