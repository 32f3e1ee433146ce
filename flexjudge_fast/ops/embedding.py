"""Rows of an embedding table, dense or quantised."""

import torch

from flexjudge_fast.ops.dequantize import dequantize


def embedding(ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """ids: [num_tokens] int64; table: [vocab_size, hidden]. Returns [num_tokens, hidden]."""
    return table[ids]


def quantized_embedding(
    ids: torch.Tensor, blocks: torch.Tensor, format_name: str, dtype: torch.dtype
) -> torch.Tensor:
    """The same from uint8 blocks [vocab_size, bytes_per_row]; only the rows asked for are expanded."""
    return dequantize(blocks[ids], format_name).to(dtype)
