"""The order in which the compiled kernels keep a KV cache's blocks, next to the plain one."""

import torch


def kernel_order(cache: torch.Tensor) -> torch.Tensor:
    """A plain cache [num_layers, 2, num_blocks, block_size, num_kv_heads, row_size] in the kernels' order.

    Per side, block and KV head: keys as [head_dim][block_size] or values as [block_size][head_dim], then, in
    int8, the tokens' scales.
    """
    scale = 4 if cache.dtype == torch.int8 else 0
    heads = cache.transpose(3, 4)  # [num_layers, 2, num_blocks, num_kv_heads, block_size, row_size]
    rows, scales = heads.split((cache.shape[-1] - scale, scale), -1)
    sides = (rows[:, 0].transpose(-1, -2).flatten(-2), rows[:, 1].flatten(-2))
    return torch.cat((torch.stack(sides, 1), scales.flatten(-2)), -1).reshape(cache.shape)


def plain_order(cache: torch.Tensor) -> torch.Tensor:
    """The inverse of `kernel_order`, for a cache of floats."""
    places = kernel_order(torch.arange(cache.numel()).view(cache.shape))
    out = torch.empty_like(cache)
    out.view(-1)[places.flatten()] = cache.flatten()
    return out
