"""Counter-based random numbers: a draw depends on its key and counter alone, never on earlier draws."""

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 (Salmon et al. 2011, section 3.3): four 32-bit words of counter, two of key."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (product1 >> 32) ^ c1 ^ k0,
            product1 & _MASK,
            (product0 >> 32) ^ c3 ^ k1,
            product0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def uniform(seed: int, request_key: int, sample: int, position: int) -> float:
    """A double in [0, 1), 53 bits, for one draw.

    Args:
        seed, request_key: 64-bit; the key is a digest of the prompt, so equal prompts draw equally.
        sample, position: 32-bit; which sample of the prompt, and which token of the sequence.
    """
    # The seed is the key; prompt, sample and position are the counter.
    counter = (request_key & _MASK, request_key >> 32, sample & _MASK, position & _MASK)
    high, low, _, _ = philox4x32(counter, (seed & _MASK, seed >> 32))
    return ((high >> 5) * 67108864 + (low >> 6)) / 9007199254740992.0
