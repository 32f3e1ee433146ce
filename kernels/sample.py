"""Draws tokens from rows of logits: banned ids, temperature, top-k, top-p, min-p and the draw: two launches.

    row:        |.... 4096 ids ....|.... 4096 ids ....| ...     first launch, a program for each: reads logits
    groups:     |32|32|32| ... 128 |32|32|32| ...               largest logit, and sum of weights, of each 32
    candidates:     [ 32 ]   [ 32 ]      [ 32 ]                 second launch, a program for each draw

The first launch reads a row once, by as many multiprocessors as it has tiles, and writes a sixteenth of that.
The second holds the 4752 groups of a row of 152,064 in registers. Greedy and plain draws need one of them:
32 more logits. A draw likeliest first finds by bisection a high bound below which no token can matter: at
least top-k groups reach it, or the weight above it, at least

    the sum over groups that reach it of max(weight of the largest, sum - 31 * weight of the bound)

is what top-p asks for. Then the few tokens above the bound are gathered and compared pair by pair: how many
are likelier, and how much they weigh, is all that the truncations and the draw need. Where more than RANKED
are left (flat logits), passes over their groups search: `sample_search`.

Bytes: the logits once, and an eighth of them to write and read summaries; no other pass over a row. Sums run
in an order that depends on the row alone, whatever else is drawn.
"""

import torch
import triton
import triton.language as tl

from flexjudge_fast.kernels.sample_search import (
    GROUP,
    ids_of,
    load_groups,
    load_listed,
    search_likeliest_first,
    weights_of,
)
from flexjudge_fast.kernels.tiles import cdiv, next_power_of_2, tiles


@triton.jit
def _row(logits_ptr, integers_ptr, floats_ptr, masks_ptr, draw, VOCAB: tl.constexpr, WORDS: tl.constexpr):
    """Where a draw's logits and bans are, whether it has bans, and 1 / temperature."""
    row_ptr = logits_ptr + tl.load(integers_ptr + 3 * draw).to(tl.int64) * VOCAB
    mask = tl.load(integers_ptr + 3 * draw + 2)
    inverse = tl.minimum(1.0 / tl.load(floats_ptr + 4 * draw), 1e30)
    return row_ptr, masks_ptr + tl.maximum(mask, 0) * WORDS, mask >= 0, inverse


@triton.jit
def _summarize_kernel(
    logits_ptr,  # [num_rows, VOCAB] float32
    integers_ptr,  # int32 [num_draws, 3]: row, top-k, number of the mask or -1
    floats_ptr,  # float32 [num_draws, 4]: temperature, top-p, min-p, uniform
    masks_ptr,  # int32 [num_masks, WORDS], a bit for each id
    work_ptr,  # float32 [num_draws, WORK]: of each group the largest logit, then the sums
    VOCAB: tl.constexpr,
    WORDS: tl.constexpr,
    WORK: tl.constexpr,
    TILE: tl.constexpr,  # groups
):
    NUM_GROUPS: tl.constexpr = (VOCAB + GROUP - 1) // GROUP
    draw = tl.program_id(0)
    row_ptr, mask_ptr, has_mask, inverse = _row(
        logits_ptr, integers_ptr, floats_ptr, masks_ptr, draw, VOCAB, WORDS
    )
    groups = tl.program_id(1) * TILE + tl.arange(0, TILE)
    logits = load_groups(row_ptr, mask_ptr, has_mask, groups, VOCAB)
    tops = tl.max(logits, 1)
    sums = tl.sum(weights_of(logits, tops[:, None], inverse), 1)
    at = work_ptr + draw.to(tl.int64) * WORK + groups
    tl.store(at, tops, mask=groups < NUM_GROUPS)
    tl.store(at + NUM_GROUPS, sums, mask=groups < NUM_GROUPS)


@triton.jit
def _draw_greedily(row_ptr, mask_ptr, has_mask, tops, groups, largest, VOCAB: tl.constexpr):
    """The first id with the largest logit."""
    group = tl.min(tl.where(tops == largest, groups, 0x7FFFFFF))
    group = tl.full((1,), group, tl.int32)
    logits = load_groups(row_ptr, mask_ptr, has_mask, group, VOCAB)
    return tl.min(tl.where(logits == largest, ids_of(group), VOCAB - 1))


@triton.jit
def _draw_in_order(
    row_ptr, mask_ptr, has_mask, sums, groups, target, largest, inverse, VOCAB: tl.constexpr
):  # fmt: skip
    """The first id at which the running sum of weights exceeds `target`; the last possible one if none."""
    beyond = (tl.cumsum(sums, 0) > target) & (sums > 0)
    first = tl.min(tl.where(beyond, groups, VOCAB))
    group = tl.where(first < VOCAB, first, tl.max(tl.where(sums > 0, groups, 0)))
    before = tl.sum(tl.where(groups < group, sums, 0.0))
    group = tl.full((1,), group, tl.int32)
    ids = ids_of(group)
    weights = weights_of(load_groups(row_ptr, mask_ptr, has_mask, group, VOCAB), largest, inverse)
    beyond = (before + tl.cumsum(weights, 1) > target) & (weights > 0)
    first = tl.min(tl.where(beyond, ids, VOCAB))
    return tl.where(first < VOCAB, first, tl.max(tl.where(weights > 0, ids, 0)))


@triton.jit
def _find_bound(
    tops, weights, sums, largest, inverse, top_k, top_p, min_p, total, GROUPS: tl.constexpr, FEW: tl.constexpr
):
    """A logit below which no token can be drawn or matter for what is; -inf if none is found.

    The search ends when FEW groups reach it, or it is as exact as need be.
    """
    low = tl.min(tl.where(weights > 0, tops, largest))
    low = tl.maximum(low, largest - 104.0 / inverse)  # what weighs nothing in float32
    high = largest
    bound = tl.full((), float("-inf"), tl.float32)
    listed = tl.full((), GROUPS, tl.int32)
    step = 0
    middle = low
    limit = tl.where(top_p < 1, top_p * total, float("inf"))
    # Of top-k tokens, top-p needs the sum: all of them matter, even those that min-p leaves out.
    floor = tl.where((top_k > 0) & (top_p < 1), 0.0, min_p)
    while (step < 20) & (listed > FEW):
        weight = tl.exp((middle - largest) * inverse)
        reaches = tops >= middle
        count = tl.sum(reaches.to(tl.int32))
        above = tl.sum(tl.where(reaches, tl.maximum(weights, sums - (GROUP - 1) * weight), 0.0))
        enough = tl.where(top_k > 0, count >= top_k, above >= limit) | (weight < floor)
        bound = tl.where(enough, middle, bound)
        listed = tl.where(enough, count, listed)
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
        middle = low + 0.5 * (high - low)
        step += 1
    return bound


@triton.jit
def _gather(
    row_ptr, mask_ptr, has_mask, list_ptr, num_listed, ids_ptr, found_ptr, bound, largest, inverse,
    VOCAB: tl.constexpr, CHUNK: tl.constexpr, RANKED: tl.constexpr,
):  # fmt: skip
    """Writes ids and logits of what reaches the bound, and counts them: to RANKED, and a little more."""
    found = 0
    start = 0
    while (start < num_listed) & (found <= RANKED):
        groups = load_listed(list_ptr, num_listed, start, VOCAB, CHUNK)
        logits = load_groups(row_ptr, mask_ptr, has_mask, groups, VOCAB)
        wanted = (logits >= bound) & (weights_of(logits, largest, inverse) > 0)
        wanted = tl.reshape(wanted.to(tl.int32), (CHUNK * GROUP,))
        place = found + tl.cumsum(wanted, 0) - 1
        stored = (wanted > 0) & (place < RANKED)
        tl.store(ids_ptr + place, tl.reshape(ids_of(groups), (CHUNK * GROUP,)), mask=stored)
        tl.store(found_ptr + place, tl.reshape(logits, (CHUNK * GROUP,)), mask=stored)
        found += tl.sum(wanted)
        start += CHUNK
    tl.debug_barrier()
    return found


@triton.jit
def _rank(
    found_ptr, rank_ptr, before_ptr, found, largest, inverse, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Writes of each candidate how many are likelier, ties by id, and what they weigh."""
    for first in range(0, found, ROWS):
        row = first + tl.arange(0, ROWS)
        mine = tl.load(found_ptr + row, mask=row < found, other=float("-inf"))
        rank = tl.zeros((ROWS, COLUMNS), tl.int32)
        before = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in range(0, found, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            other = tl.load(found_ptr + column, mask=column < found, other=float("-inf"))
            likelier = other[None, :] > mine[:, None]
            likelier |= (other[None, :] == mine[:, None]) & (column[None, :] < row[:, None])
            rank += likelier.to(tl.int32)
            before += tl.where(likelier, weights_of(other, largest, inverse)[None, :], 0.0)
        tl.store(rank_ptr + row, tl.sum(rank, 1), mask=row < found)
        tl.store(before_ptr + row, tl.sum(before, 1), mask=row < found)
    tl.debug_barrier()


@triton.jit
def _draw_ranked(
    ids_ptr, rank_ptr, found_ptr, before_ptr, found, top_k, top_p, min_p, uniform, total, largest, inverse,
    RANKED: tl.constexpr,
):  # fmt: skip
    """A draw among the candidates that top-k, then top-p, then min-p leave, likeliest first."""
    place = tl.arange(0, RANKED)
    inside = place < found
    ids = tl.load(ids_ptr + place, mask=inside, other=0)
    rank = tl.load(rank_ptr + place, mask=inside, other=0)
    before = tl.load(before_ptr + place, mask=inside, other=0.0)
    logits = tl.load(found_ptr + place, mask=inside, other=float("-inf"))
    weights = weights_of(logits, largest, inverse)
    inside = inside & ((top_k <= 0) | (rank < top_k))
    mass = tl.where(top_k > 0, tl.sum(tl.where(inside, weights, 0.0)), total)
    limit = tl.where(top_p < 1, top_p * mass, float("inf"))
    kept = inside & (((before < limit) & (weights >= min_p)) | (rank == 0))
    target = uniform * tl.sum(tl.where(kept, weights, 0.0))
    last = tl.max(tl.where(kept & (before <= target), rank, 0))
    return tl.max(tl.where(inside & (rank == last), ids, 0))


@triton.jit
def _draw_likeliest_first(
    row_ptr, mask_ptr, has_mask, work_ptr, ints_ptr, bound, tops, weights, groups, top_k, top_p, min_p,
    uniform, total, largest, inverse, VOCAB: tl.constexpr, CHUNK: tl.constexpr, RANKED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Lists groups that reach the bound, in order, and draws among their tokens."""
    listed = (tops >= bound) & (weights > 0)
    place = tl.cumsum(listed.to(tl.int32), 0) - 1
    # The list takes no more than the vocabulary's groups; behind it are four numbers of each candidate.
    ids_ptr = ints_ptr + (VOCAB + GROUP - 1) // GROUP
    tl.store(ints_ptr + place, groups, mask=listed)
    num_listed = tl.sum(listed.to(tl.int32))
    tl.debug_barrier()
    found_ptr = work_ptr + (VOCAB + GROUP - 1) // GROUP + 2 * RANKED
    found = _gather(
        row_ptr, mask_ptr, has_mask, ints_ptr, num_listed, ids_ptr, found_ptr, bound, largest, inverse,
        VOCAB, CHUNK, RANKED,
    )  # fmt: skip
    if found <= RANKED:
        _rank(found_ptr, ids_ptr + RANKED, found_ptr + RANKED, found, largest, inverse, ROWS, COLUMNS)
        token = _draw_ranked(
            ids_ptr, ids_ptr + RANKED, found_ptr, found_ptr + RANKED, found, top_k, top_p, min_p, uniform,
            total, largest, inverse, RANKED,
        )  # fmt: skip
    else:
        token = search_likeliest_first(
            row_ptr, mask_ptr, has_mask, ints_ptr, num_listed, top_k, top_p, min_p, uniform, total, largest,
            inverse, VOCAB, CHUNK,
        )  # fmt: skip
    return token


@triton.jit
def _draw_kernel(
    logits_ptr,  # [num_rows, VOCAB] float32
    integers_ptr,  # as above
    floats_ptr,
    masks_ptr,
    work_ptr,  # float32 [num_draws, WORK]
    ints_ptr,  # int32, the same memory
    out_ptr,  # int64 [num_draws]
    VOCAB: tl.constexpr,
    WORDS: tl.constexpr,
    WORK: tl.constexpr,
    GROUPS: tl.constexpr,  # a power of two
    FEW: tl.constexpr,
    CHUNK: tl.constexpr,
    RANKED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    NUM_GROUPS: tl.constexpr = (VOCAB + GROUP - 1) // GROUP
    draw = tl.program_id(0)
    row_ptr, mask_ptr, has_mask, inverse = _row(
        logits_ptr, integers_ptr, floats_ptr, masks_ptr, draw, VOCAB, WORDS
    )
    top_k = tl.load(integers_ptr + 3 * draw + 1)
    temperature, top_p = tl.load(floats_ptr + 4 * draw), tl.load(floats_ptr + 4 * draw + 1)
    min_p, uniform = tl.load(floats_ptr + 4 * draw + 2), tl.load(floats_ptr + 4 * draw + 3)
    work_ptr += draw.to(tl.int64) * WORK
    ints_ptr += draw.to(tl.int64) * WORK
    groups = tl.arange(0, GROUPS)
    tops = tl.load(work_ptr + groups, mask=groups < NUM_GROUPS, other=float("-inf"))
    sums = tl.load(work_ptr + NUM_GROUPS + groups, mask=groups < NUM_GROUPS, other=0.0)
    largest = tl.max(tops)
    token = 0
    if temperature == 0:
        token = _draw_greedily(row_ptr, mask_ptr, has_mask, tops, groups, largest, VOCAB)
    else:
        weights = weights_of(tops, largest, inverse)
        sums *= weights
        total = tl.sum(sums)
        if (top_k > 0) | (top_p < 1) | (min_p > 0):
            bound = _find_bound(
                tops, weights, sums, largest, inverse, top_k, top_p, min_p, total, GROUPS, FEW
            )
            token = _draw_likeliest_first(
                row_ptr, mask_ptr, has_mask, work_ptr + 2 * NUM_GROUPS, ints_ptr + 2 * NUM_GROUPS, bound,
                tops, weights, groups, top_k, top_p, min_p, uniform, total, largest, inverse,
                VOCAB, CHUNK, RANKED, ROWS, COLUMNS,
            )  # fmt: skip
        else:
            token = _draw_in_order(
                row_ptr, mask_ptr, has_mask, sums, groups, uniform * total, largest, inverse, VOCAB
            )
    tl.store(out_ptr + draw, tl.minimum(tl.maximum(token, 0), VOCAB - 1).to(tl.int64))


def sample(
    logits: torch.Tensor, integers: torch.Tensor, floats: torch.Tensor, masks: torch.Tensor
) -> torch.Tensor:
    """Draw a token for each row of `integers` and `floats`.

    Args:
        logits: [num_rows, vocab_size] float32.
        integers: int32 [num_draws, 3]: row of the logits, top-k (0: all), row of `masks` (-1: none).
        floats: float32 [num_draws, 4]: temperature (0: greedy), top-p, min-p, and a uniform number in [0, 1).
        masks: int32 [num_masks, ceil(vocab_size / 32)]: bit `id % 32` of word `id // 32` bans an id.

    Returns:
        [num_draws] int64.
    """
    num_draws, vocab = len(integers), logits.shape[1]
    out = torch.empty(num_draws, dtype=torch.int64, device=logits.device)
    if not num_draws:
        return out
    num_groups = cdiv(vocab, 32)
    summary, draw = tiles("sample", "summary"), tiles("sample", "draw")
    # Of each group the largest logit, sum, and place in a list; of each candidate id, rank, logit, sum.
    size = 3 * num_groups + 4 * draw["RANKED"]
    work = torch.empty(num_draws, size, dtype=torch.float32, device=logits.device)
    sizes = {"VOCAB": vocab, "WORDS": masks.shape[1], "WORK": size}
    _summarize_kernel[(num_draws, cdiv(num_groups, summary["TILE"]))](
        logits, integers, floats, masks, work, **sizes, **summary
    )
    _draw_kernel[(num_draws,)](
        logits, integers, floats, masks, work, work.view(torch.int32), out,
        GROUPS=next_power_of_2(num_groups), **sizes, **draw,
    )  # fmt: skip
    return out
