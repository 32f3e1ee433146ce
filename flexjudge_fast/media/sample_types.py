"""What samples of every type become: float32, full scale at -1..1."""

import numpy as np
from numpy.typing import NDArray

from flexjudge_fast.errors import MediaError

# What is subtracted first, and what full scale is.
_SCALES = {
    "uint8": (128.0, 128.0),
    "int16": (0.0, 32768.0),
    "int32": (0.0, 2147483648.0),
    "float16": (0.0, 1.0),
    "float32": (0.0, 1.0),
    "float64": (0.0, 1.0),
}


def check_type(dtype: str) -> None:
    """MediaError unless samples of this type have a defined full scale."""
    if dtype not in _SCALES:
        raise MediaError(f"samples of {dtype}; {', '.join(_SCALES)} are read")


def to_float32(block: NDArray[np.generic]) -> NDArray[np.float32]:
    """Any shape. Integers are divided by the largest negative one, floats kept even beyond -1..1.

    float64 is rounded; what float32 cannot hold becomes infinite. MediaError as of `check_type`.
    """
    check_type(block.dtype.name)
    zero, full = _SCALES[block.dtype.name]
    with np.errstate(over="ignore"):
        values = block.astype(np.float32)
    if zero:
        values -= np.float32(zero)
    if full != 1.0:
        values *= np.float32(1.0 / full)  # a power of two: exact
    return values
