"""The block formats of GGUF that stay quantised in memory (ggml's `block_*` structs)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class QuantFormat:
    """`block_size` weights of a row take `block_bytes` bytes."""

    name: str
    block_size: int
    block_bytes: int


QUANT_FORMATS = (
    QuantFormat("Q4_0", 32, 18),
    QuantFormat("Q4_1", 32, 20),
    QuantFormat("Q5_0", 32, 22),
    QuantFormat("Q5_1", 32, 24),
    QuantFormat("Q8_0", 32, 34),
    QuantFormat("Q4_K", 256, 144),
    QuantFormat("Q5_K", 256, 176),
    QuantFormat("Q6_K", 256, 210),
)


def find_format(name: str) -> QuantFormat | None:
    """The format of this name, if it is supported."""
    return next((f for f in QUANT_FORMATS if f.name == name), None)
