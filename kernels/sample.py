"""Draws tokens from rows of logits: banned ids, temperature, top-k, top-p, min-p and the draw in one launch.

One program a draw. Nothing is sorted: a place in the order of likelihood is searched for among the logits'
bit patterns, which order as the logits do; each pass over the row sums or counts what lies above eight of
them, and leaves an eighth of the range. A row of 152,064 float32 is 608 KB, which stays in the L2 cache:
eleven passes for each of top-k, top-p and the draw among what they leave, three passes without them. Sums
run over the vocabulary in one order, whatever else is drawn.
"""

import torch
import triton
import triton.language as tl

from flexjudge_fast.kernels.tiles import tiles

_LOWEST = tl.constexpr(-2147483648)  # below every key


@triton.jit
def _load(row_ptr, mask_ptr, ids, VOCAB: tl.constexpr, has_mask):
    """Logits of ids, -inf where they are banned or beyond the vocabulary."""
    inside = ids < VOCAB
    logits = tl.load(row_ptr + ids, mask=inside, other=float("-inf"))
    words = tl.load(mask_ptr + ids // 32, mask=inside & has_mask, other=0)
    return tl.where((words >> (ids % 32)) & 1 != 0, float("-inf"), logits)


@triton.jit
def _key(logits):
    """int32 that order as the logits do; both zeros are one."""
    bits = (logits + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _weights(logits, largest, inverse):
    """exp((logit - largest) / temperature), and 0 for -inf, also where everything is -inf."""
    return tl.where(logits == float("-inf"), 0.0, tl.exp((logits - largest) * inverse))


@triton.jit
def _above(row_ptr, mask_ptr, has_mask, key, largest, inverse, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of weights with larger keys, and how many there are."""
    total = tl.zeros((BLOCK,), tl.float32)
    count = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, VOCAB, BLOCK):
        logits = _load(row_ptr, mask_ptr, start + tl.arange(0, BLOCK), VOCAB, has_mask)
        above = _key(logits) > key
        total += tl.where(above, _weights(logits, largest, inverse), 0.0)
        count += above.to(tl.int32)
    return tl.sum(total), tl.sum(count)


@triton.jit
def _little(
    row_ptr, mask_ptr, has_mask, keys, limit, largest, inverse, ASKED: tl.constexpr,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of eight keys, how many have more than a little above them (see `_lowest_key`)."""
    above = tl.zeros((8, BLOCK), tl.float32)
    for start in range(0, VOCAB, BLOCK):
        logits = _load(row_ptr, mask_ptr, start + tl.arange(0, BLOCK), VOCAB, has_mask)
        size = tl.full((BLOCK,), 1.0, tl.float32) if ASKED == "count" else _weights(logits, largest, inverse)
        above += tl.where(_key(logits)[None, :] > keys[:, None], size[None, :], 0.0)
    found = tl.sum(above, 1)
    is_much = found > limit if ASKED == "at most" else found >= limit
    return tl.sum(is_much.to(tl.int32))


@triton.jit
def _lowest_key(
    row_ptr, mask_ptr, has_mask, highest, limit, largest, inverse, ASKED: tl.constexpr,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The lowest key above which there is little: fewer than `limit` (ASKED "count"), less weight ("below"),
    or no more weight ("at most"). And what does lie above it: weight, count."""
    low = tl.full((), _LOWEST, tl.int64)
    high = highest.to(tl.int64)  # nothing lies above it
    while low < high:
        span = high - low
        keys = (low + (span * tl.arange(0, 8)) // 8).to(tl.int32)
        much = _little(row_ptr, mask_ptr, has_mask, keys, limit, largest, inverse, ASKED, VOCAB, BLOCK)
        high = tl.where(much < 8, low + (span * much) // 8, high)
        low = tl.where(much > 0, low + (span * (much - 1)) // 8 + 1, low)
    key = high.to(tl.int32)
    weight, count = _above(row_ptr, mask_ptr, has_mask, key, largest, inverse, VOCAB, BLOCK)
    return key, weight, count


@triton.jit
def _nth_of(row_ptr, mask_ptr, has_mask, key, rank, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """The id that is number `rank`, or the last, of those with this key."""
    before = 0
    found = 0
    for start in range(0, VOCAB, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        logits = _load(row_ptr, mask_ptr, ids, VOCAB, has_mask)
        equal = (_key(logits) == key) & (ids < VOCAB)
        place = before + tl.cumsum(equal.to(tl.int32), 0) - 1
        last = tl.max(tl.where(equal & (place <= rank), ids, -1))
        found = tl.where(last >= 0, last, found)
        before += tl.sum(equal.to(tl.int32))
    return found


@triton.jit
def _weight_of(key, largest, inverse):
    bits = tl.where(key < 0, key ^ 0x7FFFFFFF, key)
    return tl.exp((bits.to(tl.float32, bitcast=True) - largest) * inverse)


@triton.jit
def _draw_in_order(
    row_ptr, mask_ptr, has_mask, target, largest, inverse, VOCAB: tl.constexpr, BLOCK: tl.constexpr
):
    """The first id at which the running sum of weights exceeds `target`; the last possible one if none."""
    before = 0.0
    found = -1
    last = 0
    for start in range(0, VOCAB, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        weights = _weights(_load(row_ptr, mask_ptr, ids, VOCAB, has_mask), largest, inverse)
        running = before + tl.cumsum(weights, 0)
        first = tl.min(tl.where((running > target) & (weights > 0), ids, VOCAB))
        found = tl.where((found < 0) & (first < VOCAB), first, found)
        last = tl.maximum(last, tl.max(tl.where(weights > 0, ids, 0)))
        before += tl.sum(weights)
    return tl.where(found < 0, last, found)


@triton.jit
def _kept(
    row_ptr, mask_ptr, has_mask, highest, top_k, top_p, total, largest, inverse,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What top-k, then top-p leave: the lowest key, and how many of it."""
    key = tl.full((), _LOWEST, tl.int32)
    ties = tl.full((), VOCAB, tl.int32)
    kept = total
    if (top_k > 0) & (top_k < VOCAB):
        key, above, count = _lowest_key(
            row_ptr, mask_ptr, has_mask, highest, top_k, largest, inverse, "count", VOCAB, BLOCK
        )
        ties = top_k - count
        kept = above + ties.to(tl.float32) * _weight_of(key, largest, inverse)
    if top_p < 1:
        limit = top_p * kept
        nucleus, above, count = _lowest_key(
            row_ptr, mask_ptr, has_mask, highest, limit, largest, inverse, "below", VOCAB, BLOCK
        )
        weight = tl.maximum(_weight_of(nucleus, largest, inverse), 1e-38)
        number = tl.maximum(tl.minimum(tl.ceil((limit - above) / weight), VOCAB), 1.0).to(tl.int32)
        ties = tl.where(nucleus > key, number, tl.where(nucleus == key, tl.minimum(ties, number), ties))
        key = tl.maximum(key, nucleus)
    return key, ties


@triton.jit
def _draw_likeliest_first(
    row_ptr, mask_ptr, has_mask, highest, uniform, key, ties, min_p, largest, inverse,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A draw among keys above `key`, `ties` of `key`, and of them what min-p leaves; likeliest first."""
    sums = tl.zeros((BLOCK,), tl.float32)
    equal = tl.zeros((BLOCK,), tl.int32)
    lowest = tl.full((BLOCK,), 2147483647, tl.int32)
    for start in range(0, VOCAB, BLOCK):
        logits = _load(row_ptr, mask_ptr, start + tl.arange(0, BLOCK), VOCAB, has_mask)
        weights, keys = _weights(logits, largest, inverse), _key(logits)
        kept = (keys >= key) & (weights >= min_p) & (weights > 0)
        sums += tl.where(kept & (keys > key), weights, 0.0)
        equal += (kept & (keys == key)).to(tl.int32)
        lowest = tl.minimum(lowest, tl.where(kept, keys, highest))
    tied = tl.minimum(tl.sum(equal), ties)
    of_ties = tl.where(tied > 0, tied.to(tl.float32) * _weight_of(key, largest, inverse), 0.0)
    target = uniform * (tl.sum(sums) + of_ties)
    at, above, _ = _lowest_key(
        row_ptr, mask_ptr, has_mask, highest, target, largest, inverse, "at most", VOCAB, BLOCK
    )
    floor = tl.min(lowest)
    beyond = at < floor  # by rounding: the last that is kept is drawn
    at = tl.maximum(at, floor)
    weight = tl.maximum(_weight_of(at, largest, inverse), 1e-38)
    rank = tl.minimum(tl.maximum((target - above) / weight, 0.0), VOCAB).to(tl.int32)
    rank = tl.where(beyond, VOCAB, rank)
    rank = tl.where(at == key, tl.minimum(rank, tl.maximum(tied - 1, 0)), rank)
    return _nth_of(row_ptr, mask_ptr, has_mask, at, rank, VOCAB, BLOCK)


@triton.jit
def _sample_kernel(
    logits_ptr,  # [num_rows, VOCAB] float32
    integers_ptr,  # int32 [num_draws, 3]: row, top-k, number of the mask or -1
    floats_ptr,  # float32 [num_draws, 4]: temperature, top-p, min-p, uniform
    masks_ptr,  # int32 [num_masks, WORDS], a bit for each id
    out_ptr,  # int64 [num_draws]
    VOCAB: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    draw = tl.program_id(0)
    row_ptr = logits_ptr + tl.load(integers_ptr + 3 * draw).to(tl.int64) * VOCAB
    top_k, mask = tl.load(integers_ptr + 3 * draw + 1), tl.load(integers_ptr + 3 * draw + 2)
    temperature, top_p = tl.load(floats_ptr + 4 * draw), tl.load(floats_ptr + 4 * draw + 1)
    min_p, uniform = tl.load(floats_ptr + 4 * draw + 2), tl.load(floats_ptr + 4 * draw + 3)
    has_mask = mask >= 0
    mask_ptr = masks_ptr + tl.maximum(mask, 0) * WORDS
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(0, VOCAB, BLOCK):
        best = tl.maximum(best, _load(row_ptr, mask_ptr, start + tl.arange(0, BLOCK), VOCAB, has_mask))
    largest = tl.max(best)
    highest = _key(largest)
    inverse = tl.minimum(1.0 / temperature, 1e30)
    token = 0
    if temperature == 0:
        token = _nth_of(row_ptr, mask_ptr, has_mask, highest, 0, VOCAB, BLOCK)
    else:
        total, _ = _above(row_ptr, mask_ptr, has_mask, _LOWEST, largest, inverse, VOCAB, BLOCK)
        if (top_k > 0) | (top_p < 1) | (min_p > 0):
            key, ties = _kept(
                row_ptr, mask_ptr, has_mask, highest, top_k, top_p, total, largest, inverse, VOCAB, BLOCK
            )
            token = _draw_likeliest_first(
                row_ptr, mask_ptr, has_mask, highest, uniform, key, ties, min_p, largest, inverse,
                VOCAB, BLOCK,
            )  # fmt: skip
        else:
            token = _draw_in_order(
                row_ptr, mask_ptr, has_mask, uniform * total, largest, inverse, VOCAB, BLOCK
            )
    tl.store(out_ptr + draw, token.to(tl.int64))


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
    out = torch.empty(len(integers), dtype=torch.int64, device=logits.device)
    if len(out):
        _sample_kernel[(len(out),)](
            logits,
            integers,
            floats,
            masks,
            out,
            VOCAB=logits.shape[1],
            WORDS=masks.shape[1],
            **tiles("sample"),
        )
    return out
