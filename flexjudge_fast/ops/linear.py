"""Matrix products with dense and with quantised weights."""

import torch
import torch.nn.functional as F  # noqa: N812

from flexjudge_fast.ops.backend import uses_triton
from flexjudge_fast.ops.dequantize import dequantize

_CHUNK_BYTES = 4 << 20  # expanded weights at once: they are used while they are still in the L2/L3 cache


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`x @ weight.T + bias`.

    Args:
        x: [num_tokens, in_features], any float dtype.
        weight: [out_features, in_features], dtype of `x`.
        bias: [out_features], dtype of `x`.

    Returns:
        [num_tokens, out_features], dtype of `x`.
    """
    if uses_triton(x):
        from flexjudge_fast.kernels.linear import linear as kernel

        return kernel(x, weight, bias)
    return linear_reference(x, weight, bias)


def linear_reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The same in plain torch."""
    out = F.linear(x, weight)
    return out if bias is None else out + bias


def quantized_linear(x: torch.Tensor, blocks: torch.Tensor, format_name: str) -> torch.Tensor:
    """`x @ dequantize(blocks).T`, a few rows of the weight at a time.

    On a GPU by the kernel of dense weights, so that a token's bits are the same in any batch; expanding the
    weight at each use makes it slow there.

    Args:
        x: [num_tokens, in_features], any float dtype.
        blocks: uint8 [out_features, bytes_per_row].

    Returns:
        [num_tokens, out_features], dtype of `x`.
    """
    rows = max(_CHUNK_BYTES // (4 * x.shape[1]), 1)
    out = x.new_empty(x.shape[0], blocks.shape[0])
    for start in range(0, blocks.shape[0], rows):
        chunk = dequantize(blocks[start : start + rows], format_name).to(x.dtype)
        out[:, start : start + rows] = linear(x, chunk)
    return out
