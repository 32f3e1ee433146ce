"""What torch and flash-attn take for the job of a kernel's launch, where one of their calls does that job."""

from collections.abc import Callable
from importlib.util import find_spec

import torch
import torch.nn.functional as F  # noqa: N812

from flexjudge_fast.kernels.catalog import Launch, ModelShape
from flexjudge_fast.kernels.catalog_attention import CASES
from flexjudge_fast.kernels.catalog_linear import layer_matrices
from flexjudge_fast.kernels.catalog_small import FRAME, PATCHES, WINDOW

Call = Callable[[], object]


def peers(launch: Launch, shape: ModelShape) -> dict[str, Call]:
    """Calls by name; empty where no single call of theirs does the same job."""
    name = launch.case.split(",")[0]
    if launch.kernel.startswith("linear"):
        return {"torch bf16": _product(name, launch.tokens, shape)}
    if launch.kernel in ("paged_prefill", "paged_decode"):
        return _attention(name, shape)
    if launch.kernel == "segment_attention":
        return {"torch sdpa": _vision(WINDOW if "windows" in launch.case else FRAME, shape)}
    return {}


def _random(*size: int) -> torch.Tensor:
    return torch.randn(size, dtype=torch.bfloat16, device="cuda")


def _product(name: str, tokens: int, shape: ModelShape) -> Call:
    rows, columns, _ = {**layer_matrices(shape), "lm head": (shape.vocab, shape.hidden, False)}[name]
    x, weight = _random(tokens, columns), _random(rows, columns)
    return lambda: F.linear(x, weight)


def _attention(name: str, shape: ModelShape) -> dict[str, Call]:
    """Of sequences of one length, each with keys and values of its own, nothing paged."""
    new, lens, _ = CASES[name]
    query = _random(len(new), new[0], shape.num_heads, shape.head_dim)
    key, value = (_random(len(new), lens[0], shape.num_kv_heads, shape.head_dim) for _ in range(2))
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    mask = torch.ones(new[0], lens[0], dtype=torch.bool, device="cuda").tril(lens[0] - new[0])
    mask = None if new[0] == 1 else mask
    calls: dict[str, Call] = {
        "torch sdpa": lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    }
    if find_spec("flash_attn") is not None:
        from flash_attn import flash_attn_func

        calls["flash-attn"] = lambda: flash_attn_func(query, key, value, causal=True)
    return calls


def _vision(size: int, shape: ModelShape) -> Call:
    heads = (PATCHES // size, shape.vision_heads, size, shape.vision_head_dim)
    q, k, v = (_random(*heads) for _ in range(3))
    return lambda: F.scaled_dot_product_attention(q, k, v)
