"""Reads logits by groups of 32 ids, and draws where too many tokens are possible for `sample` to rank them.

A group is the ids of one word of a mask. What is searched is a list of groups of a row; ids outside it
count as impossible. Nothing is sorted: a place in the order of likelihood is searched for among the logits'
bit patterns, which order as the logits do. A pass over the list sums or counts what lies above eight of them
and leaves an eighth of the range: eleven passes for each of top-k, top-p and the draw among what they leave.
"""

import triton
import triton.language as tl

GROUP: tl.constexpr = tl.constexpr(32)
_LOWEST: tl.constexpr = tl.constexpr(-2147483648)  # below every key


@triton.jit
def load_groups(row_ptr, mask_ptr, has_mask, groups, VOCAB: tl.constexpr):
    """Logits of groups, [len(groups), GROUP]; -inf where they are banned or beyond the vocabulary."""
    ids = ids_of(groups)
    logits = tl.load(row_ptr + ids, mask=ids < VOCAB, other=float("-inf"))
    words = tl.load(mask_ptr + groups, mask=(groups * GROUP < VOCAB) & has_mask, other=0)
    banned = (words[:, None] >> tl.arange(0, GROUP)[None, :]) & 1 != 0
    return tl.where(banned, float("-inf"), logits)


@triton.jit
def ids_of(groups):
    return groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]


@triton.jit
def weights_of(logits, largest, inverse):
    """exp((logit - largest) / temperature), and 0 for -inf, also where everything is -inf."""
    return tl.where(logits == float("-inf"), 0.0, tl.exp((logits - largest) * inverse))


@triton.jit
def load_listed(list_ptr, num_listed, start, VOCAB: tl.constexpr, CHUNK: tl.constexpr):
    """CHUNK groups of a list; past its end, a group beyond the vocabulary."""
    place = start + tl.arange(0, CHUNK)
    return tl.load(list_ptr + place, mask=place < num_listed, other=(VOCAB + GROUP - 1) // GROUP)


@triton.jit
def _key(logits):
    """int32 that order as the logits do; both zeros are one."""
    bits = (logits + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _weight_of(key, largest, inverse):
    bits = tl.where(key < 0, key ^ 0x7FFFFFFF, key)
    return tl.exp((bits.to(tl.float32, bitcast=True) - largest) * inverse)


@triton.jit
def _above(
    row_ptr, mask_ptr, has_mask, list_ptr, num_listed, key, largest, inverse,
    VOCAB: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The sum of weights with larger keys, and how many there are."""
    total = tl.zeros((CHUNK, GROUP), tl.float32)
    count = tl.zeros((CHUNK, GROUP), tl.int32)
    for start in range(0, num_listed, CHUNK):
        groups = load_listed(list_ptr, num_listed, start, VOCAB, CHUNK)
        logits = load_groups(row_ptr, mask_ptr, has_mask, groups, VOCAB)
        above = _key(logits) > key
        total += tl.where(above, weights_of(logits, largest, inverse), 0.0)
        count += above.to(tl.int32)
    return tl.sum(total), tl.sum(count)


@triton.jit
def _little(
    row_ptr, mask_ptr, has_mask, list_ptr, num_listed, keys, limit, largest, inverse, ASKED: tl.constexpr,
    VOCAB: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Of eight keys, how many have more than a little above them (see `_lowest_key`)."""
    above = tl.zeros((8, CHUNK, GROUP), tl.float32)
    for start in range(0, num_listed, CHUNK):
        groups = load_listed(list_ptr, num_listed, start, VOCAB, CHUNK)
        logits = load_groups(row_ptr, mask_ptr, has_mask, groups, VOCAB)
        if ASKED == "count":
            size = tl.full((CHUNK, GROUP), 1.0, tl.float32)
        else:
            size = weights_of(logits, largest, inverse)
        above += tl.where(_key(logits)[None, :, :] > keys[:, None, None], size[None, :, :], 0.0)
    found = tl.sum(tl.sum(above, 2), 1)
    is_much = found > limit if ASKED == "at most" else found >= limit
    return tl.sum(is_much.to(tl.int32))


@triton.jit
def _lowest_key(
    row_ptr, mask_ptr, has_mask, list_ptr, num_listed, limit, largest, inverse, ASKED: tl.constexpr,
    VOCAB: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The lowest key above which there is little: fewer than `limit` (ASKED "count"), less weight ("below"),
    or no more weight ("at most"). And what does lie above it: weight, count."""
    low = tl.full((), _LOWEST, tl.int64)
    high = _key(largest).to(tl.int64)  # nothing lies above it
    while low < high:
        span = high - low
        keys = (low + (span * tl.arange(0, 8)) // 8).to(tl.int32)
        much = _little(
            row_ptr, mask_ptr, has_mask, list_ptr, num_listed, keys, limit, largest, inverse, ASKED,
            VOCAB, CHUNK,
        )  # fmt: skip
        high = tl.where(much < 8, low + (span * much) // 8, high)
        low = tl.where(much > 0, low + (span * (much - 1)) // 8 + 1, low)
    key = high.to(tl.int32)
    weight, count = _above(
        row_ptr, mask_ptr, has_mask, list_ptr, num_listed, key, largest, inverse, VOCAB, CHUNK
    )
    return key, weight, count


@triton.jit
def _nth_of(
    row_ptr, mask_ptr, has_mask, list_ptr, num_listed, key, rank, VOCAB: tl.constexpr, CHUNK: tl.constexpr
):
    """The id that is number `rank`, or the last, of those with this key."""
    before = 0
    found = 0
    for start in range(0, num_listed, CHUNK):
        groups = load_listed(list_ptr, num_listed, start, VOCAB, CHUNK)
        ids = tl.reshape(ids_of(groups), (CHUNK * GROUP,))
        logits = load_groups(row_ptr, mask_ptr, has_mask, groups, VOCAB)
        equal = tl.reshape(_key(logits) == key, (CHUNK * GROUP,)) & (ids < VOCAB)
        place = before + tl.cumsum(equal.to(tl.int32), 0) - 1
        last = tl.max(tl.where(equal & (place <= rank), ids, -1))
        found = tl.where(last >= 0, last, found)
        before += tl.sum(equal.to(tl.int32))
    return found


@triton.jit
def _kept(
    row_ptr, mask_ptr, has_mask, list_ptr, num_listed, top_k, top_p, total, largest, inverse,
    VOCAB: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """What top-k, then top-p leave: the lowest key, and how many of it."""
    key = tl.full((), _LOWEST, tl.int32)
    ties = tl.full((), VOCAB, tl.int32)
    kept = total
    if (top_k > 0) & (top_k < VOCAB):
        key, above, count = _lowest_key(
            row_ptr, mask_ptr, has_mask, list_ptr, num_listed, top_k, largest, inverse, "count", VOCAB, CHUNK
        )
        ties = top_k - count
        kept = above
        if key > _LOWEST:  # the lowest, where fewer than top-k are listed, is no logit's
            kept += ties.to(tl.float32) * _weight_of(key, largest, inverse)
    if top_p < 1:
        limit = top_p * kept
        nucleus, above, count = _lowest_key(
            row_ptr, mask_ptr, has_mask, list_ptr, num_listed, limit, largest, inverse, "below", VOCAB, CHUNK
        )
        weight = tl.maximum(_weight_of(nucleus, largest, inverse), 1e-38)
        number = tl.maximum(tl.minimum(tl.ceil((limit - above) / weight), VOCAB), 1.0).to(tl.int32)
        ties = tl.where(nucleus > key, number, tl.where(nucleus == key, tl.minimum(ties, number), ties))
        key = tl.maximum(key, nucleus)
    return key, ties


@triton.jit
def search_likeliest_first(
    row_ptr, mask_ptr, has_mask, list_ptr, num_listed, top_k, top_p, min_p, uniform, total, largest, inverse,
    VOCAB: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """A draw among what top-k, then top-p, then min-p leave of the listed groups; likeliest first.

    total: the weights of the whole row. Past top-k, or past top-p of the whole, groups need not be listed.
    """
    key, ties = _kept(
        row_ptr, mask_ptr, has_mask, list_ptr, num_listed, top_k, top_p, total, largest, inverse, VOCAB, CHUNK
    )
    sums = tl.zeros((CHUNK, GROUP), tl.float32)
    equal = tl.zeros((CHUNK, GROUP), tl.int32)
    highest = _key(largest)
    lowest = tl.full((CHUNK, GROUP), 2147483647, tl.int32)
    for start in range(0, num_listed, CHUNK):
        groups = load_listed(list_ptr, num_listed, start, VOCAB, CHUNK)
        logits = load_groups(row_ptr, mask_ptr, has_mask, groups, VOCAB)
        weights, keys = weights_of(logits, largest, inverse), _key(logits)
        kept = (keys >= key) & (weights >= min_p) & (weights > 0)
        sums += tl.where(kept & (keys > key), weights, 0.0)
        equal += (kept & (keys == key)).to(tl.int32)
        lowest = tl.minimum(lowest, tl.where(kept, keys, highest))
    tied = tl.minimum(tl.sum(equal), ties)
    of_ties = tl.where(tied > 0, tied.to(tl.float32) * _weight_of(key, largest, inverse), 0.0)
    target = uniform * (tl.sum(sums) + of_ties)
    at, above, _ = _lowest_key(
        row_ptr, mask_ptr, has_mask, list_ptr, num_listed, target, largest, inverse, "at most", VOCAB, CHUNK
    )
    floor = tl.min(lowest)
    beyond = at < floor  # by rounding: the last that is kept is drawn
    at = tl.maximum(at, floor)
    weight = tl.maximum(_weight_of(at, largest, inverse), 1e-38)
    rank = tl.minimum(tl.maximum((target - above) / weight, 0.0), VOCAB).to(tl.int32)
    rank = tl.where(beyond, VOCAB, rank)
    rank = tl.where(at == key, tl.minimum(rank, tl.maximum(tied - 1, 0)), rank)
    return _nth_of(row_ptr, mask_ptr, has_mask, list_ptr, num_listed, at, rank, VOCAB, CHUNK)
