"""Counter-based random numbers: a draw depends on its key and counter alone, never on earlier draws."""

from collections.abc import Sequence
from typing import Any

import numpy as np

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
_FEW = 16  # draws: more take less time side by side than one by one


def philox4x32(counter: tuple[Any, Any, Any, Any], key: tuple[Any, Any]) -> tuple[Any, Any, Any, Any]:
    """Philox4x32-10 (Salmon et al. 2011, section 3.3): four 32-bit words of counter, two of key.

    Each word is an int, or a uint64 array: then several run side by side.
    """
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


def uniforms(draws: Sequence[tuple[int, int, int, int]]) -> list[float]:
    """A double in [0, 1), 53 bits, for each draw: (seed, request key, sample, position).

    Seed and key have 64 bits; the key is a digest of the prompt, so equal prompts draw equally. Which sample
    of the prompt, and which token of the sequence: 32 bits each.
    """
    if len(draws) <= _FEW:
        return [_uniform(*draw) for draw in draws]
    found: list[float] = _uniform(*np.array(draws, dtype=np.uint64).T).tolist()
    return found


def _uniform(seed: Any, request_key: Any, sample: Any, position: Any) -> Any:
    """Of ints, or of uint64 arrays. The seed is the key; prompt, sample and position are the counter."""
    counter = (request_key & _MASK, request_key >> 32, sample & _MASK, position & _MASK)
    high, low, _, _ = philox4x32(counter, (seed & _MASK, seed >> 32))
    return ((high >> 5) * 67108864 + (low >> 6)) / 9007199254740992.0
