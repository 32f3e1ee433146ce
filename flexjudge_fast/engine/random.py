"""Counter-based random numbers: a draw depends on its key and counter alone, never on earlier draws."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_MASK, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)


def philox4x32(counter: NDArray[np.uint64], key: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Philox4x32-10 (Salmon et al. 2011, section 3.3), side by side.

    Args:
        counter: [4, n] words of 32 bits. key: [2, n].

    Returns:
        [4, n] words of 32 bits.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (product1 >> _HALF) ^ c1 ^ k0,
            product1 & _MASK,
            (product0 >> _HALF) ^ c3 ^ k1,
            product0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return np.stack((c0, c1, c2, c3))


def uniforms(draws: Sequence[tuple[int, int, int, int]]) -> list[float]:
    """A double in [0, 1), 53 bits, for each draw: (seed, request key, sample, position).

    Seed and key have 64 bits; the key is a digest of the prompt, so equal prompts draw equally. Which sample
    of the prompt, and which token of the sequence: 32 bits each.
    """
    seed, request_key, sample, position = np.array(draws, dtype=np.uint64).reshape(-1, 4).T
    # The seed is the key; prompt, sample and position are the counter.
    counter = np.stack((request_key & _MASK, request_key >> _HALF, sample & _MASK, position & _MASK))
    high, low, _, _ = philox4x32(counter, np.stack((seed & _MASK, seed >> _HALF)))
    bits = (high >> np.uint64(5)) * np.uint64(67108864) + (low >> np.uint64(6))
    found: list[float] = (bits / 9007199254740992.0).tolist()
    return found
