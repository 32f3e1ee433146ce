"""Quantises float32 weights to blocks."""

import torch

from flexjudge_fast.ops.backend import has_compiled_ops

_RANGES, _STEP = 8, 0.04  # as in csrc/cpu/quantize.cpp
_SIZES_BITS = {"I8_32": (32, 8), "Q4_1": (32, 4), "I4_64": (64, 4), "I4_128": (128, 4)}


def quantize(weight: torch.Tensor, format_name: str) -> torch.Tensor:
    """Quantise rows, each block by itself.

    A block takes the scale and offset of least squared error for the codes that its whole range gives it;
    with 4 bits shorter ranges about its middle are tried too, and the best of eight is kept.

    Args:
        weight: float32 [rows, columns], columns a multiple of the block's size.
        format_name: I8_32, Q4_1 (32 weights a block of 4 bits), I4_64 or I4_128.

    Returns:
        uint8 [rows, bytes_per_row], as `dequantize` takes it. Values beyond a half float's range give scales
        that are not finite.
    """
    if weight.device.type == "cpu" and has_compiled_ops():
        out: torch.Tensor = torch.ops.flexjudge.quantize(weight.contiguous(), format_name)
        return out
    return quantize_reference(weight, format_name)


def quantize_reference(weight: torch.Tensor, format_name: str) -> torch.Tensor:
    """The same in plain torch; sums are rounded in another order, so that a few blocks differ by one code."""
    size, bits = _SIZES_BITS[format_name]
    if weight.shape[1] % size:
        raise RuntimeError(
            f"quantize: {format_name} needs a multiple of {size} columns, not {weight.shape[1]}"
        )
    x = weight.float().reshape(-1, size)  # [num_blocks, size]
    return _affine(x, bits).reshape(weight.shape[0], -1)


def _affine(x: torch.Tensor, bits: int) -> torch.Tensor:
    """[num_blocks, 4 + size * bits / 8]: half-float scale and offset, then the codes."""
    largest = (1 << bits) - 1
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    middle, half_width = 0.5 * (low + high), 0.5 * (high - low)
    least = torch.full_like(low, torch.inf)
    scale, offset, codes = low.half(), low.half(), torch.zeros_like(x)
    for i in range(1 if bits == 8 else _RANGES):
        width = half_width * (1 - _STEP * i)
        fitted = _fit(x, _codes(x, 2 * width / largest, middle - width, largest), low)
        stored = [part.half() for part in fitted]
        found = _codes(x, stored[0].float(), stored[1].float(), largest)
        error = (x - (stored[0].float() * found + stored[1].float())).square().sum(1, keepdim=True)
        better = (error < least) | (i == 0)  # so that what is not finite shows in the scales
        least = torch.where(better, error, least)
        scale, offset = torch.where(better, stored[0], scale), torch.where(better, stored[1], offset)
        codes = torch.where(better, found, codes)
    packed = codes.to(torch.uint8)
    if bits == 4:
        runs = packed.unflatten(1, (-1, 2, 16))  # [num_blocks, tiles, 2, 16]
        packed = (runs[:, :, 0] | runs[:, :, 1] << 4).flatten(1)
    return torch.cat((scale.view(torch.uint8), offset.view(torch.uint8), packed), 1)


def _codes(x: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor, largest: int) -> torch.Tensor:
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    return ((x - offset) * inverse).clamp(0, largest).round().nan_to_num(0)


def _fit(x: torch.Tensor, codes: torch.Tensor, low: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and offset [num_blocks, 1] of least squared error for given codes."""
    y = x - low
    spread = codes - codes.mean(1, keepdim=True)
    variance = spread.square().sum(1, keepdim=True)
    scale = torch.where(variance > 0, (spread * y).sum(1, keepdim=True) / variance, 0.0)
    return scale, low + y.mean(1, keepdim=True) - scale * codes.mean(1, keepdim=True)
