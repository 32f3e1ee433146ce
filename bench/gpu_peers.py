"""What torch and flash-attn take for the job of a kernel's launch, where one of their calls does that job."""

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812

from flexjudge_fast.kernels.catalog import Launch, ModelShape

Call = Callable[[], object]


def peers(launch: Launch, shape: ModelShape) -> dict[str, Call]:
    """Calls by name; empty where no single call of theirs does the same job."""
    found: dict[str, Call] = {}
    if launch.kernel.startswith("linear"):
        found["torch bf16"] = _product(launch, shape)
    elif launch.kernel in ("paged_prefill", "paged_decode"):
        found |= _attention(launch, shape)
    elif launch.kernel == "segment_attention":
        found["torch sdpa"] = _vision(launch, shape)
    return found
