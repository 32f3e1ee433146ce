"""Matrix products with weights of 4 bits in groups; activations stay as they are."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812

from flexjudge_fast.ops.backend import uses_triton
from flexjudge_fast.ops.dequantize import read_floats

GROUP_SIZES = (32, 64, 128)
# Blocks that `repack_w4_blocks` takes: the group's size, and the bytes before its codes.
_LAYOUTS = {
    "Q4_0": (32, 2),
    "Q4_1": (32, 4),
    "I4_64": (64, 4),
    "I4_128": (128, 4),
    "Z4_32": (32, 5),
    "Z4_64": (64, 5),
    "Z4_128": (128, 5),
}
W4_FORMATS = tuple(_LAYOUTS)
_STEP = 128  # columns whose codes are laid out together: see kernels/linear_w4a16.py
_ROWS = 128  # rows are padded to a multiple, the largest tile's


class InexactScalesError(ValueError):
    """Scales of groups that no float of 16 bits holds."""


@dataclass(frozen=True, eq=False)
class W4Matrix:
    """A matrix [out_features, in_features] as the kernel reads it.

    A weight is scale * (code - zero), or scale * code + offset, with a code in 0..15; scale and zero (or
    offset) belong to a row's `group_size` neighbouring columns. What pads has scale 0 and code 0.

    Attributes:
        codes: int16 [padded rows, padded columns / 4]. Word j of a row's 128 columns has columns j, 32 + j,
            64 + j and 96 + j, the first in the lowest bits.
        scales: int32 [padded columns / group_size, padded rows]: the bits of the scale, and above them those
            of the zero or offset.
        shape: (out_features, in_features).
        scale_dtype: float16 or bfloat16, of both numbers in `scales`.
        has_offset: whether the second number is an offset.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    shape: tuple[int, int]
    group_size: int
    scale_dtype: torch.dtype
    has_offset: bool

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    def to(self, device: torch.device) -> "W4Matrix":
        return W4Matrix(
            self.codes.to(device),
            self.scales.to(device),
            self.shape,
            self.group_size,
            self.scale_dtype,
            self.has_offset,
        )


def linear_w4a16(x: torch.Tensor, weight: W4Matrix, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`x @ dequantize_w4(weight).T + bias`.

    Weights are expanded in float32, then rounded to the dtype of `x`; sums are float32.

    Args:
        x: [num_tokens, in_features], any float dtype.
        bias: [out_features], dtype of `x`.

    Returns:
        [num_tokens, out_features], dtype of `x`.
    """
    if uses_triton(x):
        from flexjudge_fast.kernels.linear_w4a16 import linear_w4a16 as kernel

        return kernel(
            x,
            weight.codes,
            weight.scales,
            weight.shape[0],
            weight.group_size,
            weight.scale_dtype == torch.bfloat16,
            weight.has_offset,
            bias,
        )
    return linear_w4a16_reference(x, weight, bias)


def linear_w4a16_reference(
    x: torch.Tensor, weight: W4Matrix, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The same in plain torch."""
    out = F.linear(x, dequantize_w4(weight).to(x.dtype))
    return out if bias is None else out + bias


def repack_w4(codes: torch.Tensor, scales: torch.Tensor, seconds: torch.Tensor, has_offset: bool) -> W4Matrix:
    """Lay a matrix out for the kernel, losing nothing.

    Args:
        codes: uint8 [out_features, in_features], 0..15.
        scales: [out_features, in_features / group]; groups are of 32, 64, or a multiple of 128.
        seconds: same shape, zero points (whole numbers of any dtype) or, with `has_offset`, offsets.

    Raises:
        ValueError: another group size.
        InexactScalesError: numbers that neither float16 nor bfloat16 holds exactly.
    """
    rows, columns = codes.shape
    group = columns // scales.shape[1] if scales.shape[1] else 0
    if group * scales.shape[1] != columns or (group not in GROUP_SIZES and (group % 128 or not group)):
        raise ValueError(f"{columns} columns with {scales.shape[1]} scales: groups are 32, 64 or n * 128")
    if group > 128:
        scales, seconds = (part.repeat_interleave(group // 128, dim=1) for part in (scales, seconds))
        group = 128
    dtype = _exact_dtype(scales, seconds)
    more_rows, more_columns = -rows % _ROWS, -columns % _STEP
    c = F.pad(codes, (0, more_columns, 0, more_rows)).unflatten(1, (-1, 4, 32))  # [rows, steps, 4, 32]
    words = torch.stack((c[:, :, 0] | (c[:, :, 1] << 4), c[:, :, 2] | (c[:, :, 3] << 4)), dim=-1)
    pairs = torch.stack((scales.to(dtype), seconds.to(dtype)), dim=-1).transpose(0, 1)  # [groups, rows, 2]
    pairs = F.pad(pairs, (0, 0, 0, more_rows, 0, more_columns // group)).contiguous()
    return W4Matrix(
        words.flatten(1).view(torch.int16),
        pairs.view(torch.int32).squeeze(-1),
        (rows, columns),
        group,
        dtype,
        has_offset,
    )


def repack_w4_blocks(blocks: torch.Tensor, format_name: str) -> W4Matrix:
    """The same for rows of blocks: uint8 [out_features, bytes_per_row] in one of `W4_FORMATS`.

    Raises:
        ValueError: a Z format with scales that neither float16 nor bfloat16 holds exactly.
    """
    group, header = _LAYOUTS[format_name]
    b = blocks.unflatten(1, (-1, header + group // 2))  # [rows, groups, bytes]
    runs = b[:, :, header:].unflatten(2, (-1, 16))  # each holds 32 weights: low nibbles, then high ones
    codes = torch.cat((runs & 15, runs >> 4), dim=-1).flatten(1)
    if header == 5:
        return repack_w4(codes, read_floats(b[:, :, :4])[:, :, 0], b[:, :, 4], has_offset=False)
    halves = b[:, :, :header].contiguous().view(torch.float16)  # [rows, groups, 1 or 2]
    scales = halves[:, :, 0]
    seconds = halves[:, :, 1] if header == 4 else torch.full_like(scales, 8)
    return repack_w4(codes, scales, seconds, has_offset=header == 4)


def unpack_w4(weight: W4Matrix) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `repack_w4` took: codes uint8 [out_features, in_features], and scales and zeros (or offsets),
    [out_features, in_features / group_size]."""
    rows, columns = weight.shape
    pairs = weight.codes.contiguous().view(torch.uint8).unflatten(1, (-1, 32, 2))  # [rows, steps, 32, 2]
    quarters = [pairs[..., i // 2] >> 4 if i % 2 else pairs[..., i // 2] & 15 for i in range(4)]
    codes = torch.stack(quarters, dim=2).flatten(1)[:rows, :columns]
    groups = columns // weight.group_size
    numbers = weight.scales.contiguous().view(weight.scale_dtype).unflatten(1, (-1, 2))  # [groups, rows, 2]
    scales, seconds = numbers[:groups, :rows].permute(2, 1, 0)
    return codes.contiguous(), scales.contiguous(), seconds.contiguous()


def dequantize_w4(weight: W4Matrix) -> torch.Tensor:
    """float32 [out_features, in_features]."""
    codes, scales, seconds = unpack_w4(weight)
    q = codes.float().unflatten(1, (-1, weight.group_size))  # [rows, groups, group_size]
    scale, second = scales.float().unsqueeze(-1), seconds.float().unsqueeze(-1)
    values: torch.Tensor = q * scale + second if weight.has_offset else (q - second) * scale
    return values.flatten(1)


def _exact_dtype(scales: torch.Tensor, seconds: torch.Tensor) -> torch.dtype:
    """float16 or bfloat16, whichever holds these numbers exactly (NaN and infinity included)."""
    order = [torch.float16, torch.bfloat16]
    if scales.dtype == torch.bfloat16:
        order.reverse()
    numbers = [part.double().nan_to_num() for part in (scales, seconds)]
    for dtype in order:
        if all(torch.equal(part, part.to(dtype).double().nan_to_num()) for part in numbers):
            return dtype
    raise InexactScalesError("repack_w4: neither float16 nor bfloat16 holds these scales exactly")
