"""What a model launches, with the bytes and operations each launch costs: for compiling and for reports."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

EIGHT_BITS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}  # of `ModelShape.weights`


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model that kernels are compiled for; by default those of Qwen2.5-VL-7B."""

    hidden: int = 3584
    num_heads: int = 28
    num_kv_heads: int = 4
    head_dim: int = 128
    intermediate: int = 18944
    vocab: int = 152064
    block_size: int = 16
    vision_hidden: int = 1280  # 0: no vision tower
    vision_heads: int = 16
    vision_head_dim: int = 80
    vision_intermediate: int = 3420
    dtype: torch.dtype = torch.bfloat16
    kv_dtype: torch.dtype = torch.bfloat16
    weights: str = "bf16"  # or "w4a16-g128", "int8", "fp8"


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel on meta tensors.

    run: calls the launch function. num_bytes: the least to be moved; moved_bytes: what the kernel's own
    loads and stores move. needs: a feature that only some chips have, such as "fp8".
    """

    kernel: str
    case: str
    run: Callable[[], None]
    tokens: int
    num_bytes: float
    moved_bytes: float
    flops: float
    needs: str = ""


def random_tensor(*size: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Noise, where there is memory to hold it: on zeros tensor cores run faster than they will."""
    if device == "meta":
        return torch.empty(size, dtype=dtype, device=device)
    if dtype.is_floating_point:
        return torch.randn(size, device=device, dtype=torch.bfloat16).to(dtype)
    limits = torch.iinfo(dtype)
    return torch.randint(limits.min, limits.max, size, dtype=dtype, device=device)


def launches(shape: ModelShape, device: str = "meta") -> Iterator[Launch]:
    """All launches of a model of this shape, one for each variant that a step may need.

    device: "meta" to compile, "cuda" to run; then the tensors hold what can be run.
    """
    # The parts import this module for its types.
    from flexjudge_fast.kernels import catalog_attention, catalog_linear, catalog_small

    yield from catalog_attention.launches(shape, device)
    yield from catalog_linear.launches(shape, device)
    yield from catalog_small.launches(shape, device)
