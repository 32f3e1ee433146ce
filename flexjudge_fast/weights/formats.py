"""The block formats that stay quantised in memory: ggml's `block_*` structs, and our own of longer groups."""

from dataclasses import dataclass


@dataclass(frozen=True)
class QuantFormat:
    """`block_size` weights of a row take `block_bytes` bytes; where in them half floats and float32 stand."""

    name: str
    block_size: int
    block_bytes: int
    half_offsets: tuple[int, ...]
    float_offsets: tuple[int, ...] = ()


QUANT_FORMATS = (
    QuantFormat("Q4_0", 32, 18, (0,)),
    QuantFormat("Q4_1", 32, 20, (0, 2)),
    QuantFormat("Q5_0", 32, 22, (0,)),
    QuantFormat("Q5_1", 32, 24, (0, 2)),
    QuantFormat("Q8_0", 32, 34, (0,)),
    QuantFormat("Q4_K", 256, 144, (0, 2)),
    QuantFormat("Q5_K", 256, 176, (0, 2)),
    QuantFormat("Q6_K", 256, 210, (208,)),
    QuantFormat("I4_64", 64, 36, (0, 2)),  # Q4_1 with a scale and offset for 64 weights
    QuantFormat("I4_128", 128, 68, (0, 2)),
    QuantFormat("I8_32", 32, 36, (0, 2)),  # 8-bit codes with a scale and an offset
    # scale * (code - zero point), as other libraries publish them: the scale float32, which holds float16 and
    # bfloat16 alike, the zero point a byte.
    QuantFormat("Z4_32", 32, 21, (), (0,)),
    QuantFormat("Z4_64", 64, 37, (), (0,)),
    QuantFormat("Z4_128", 128, 69, (), (0,)),
    QuantFormat("Z8_32", 32, 37, (), (0,)),
)


def find_format(name: str) -> QuantFormat | None:
    """The format of this name, if it is supported."""
    return next((f for f in QUANT_FORMATS if f.name == name), None)
