"""Expands quantised blocks to float32."""

import torch

from flexjudge_fast.ops.backend import has_compiled_ops


def dequantize(blocks: torch.Tensor, format_name: str) -> torch.Tensor:
    """Expand rows of blocks.

    Args:
        blocks: uint8 [rows, bytes_per_row], contiguous rows of whole blocks.
        format_name: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K, I4_64, I4_128, I8_32, Z4_32,
            Z4_64, Z4_128 or Z8_32.

    Returns:
        float32 [rows, columns].
    """
    if blocks.device.type == "cpu" and has_compiled_ops():
        out: torch.Tensor = torch.ops.flexjudge.dequantize(blocks.contiguous(), format_name)
        return out
    return dequantize_reference(blocks, format_name)


def dequantize_reference(blocks: torch.Tensor, format_name: str) -> torch.Tensor:
    """The same in plain torch. The bit layouts of the Q formats are those of ggml's `ggml-common.h`."""
    block_bytes, expand = {
        "Q4_0": (18, _q4_0),
        "Q4_1": (20, _q4_1),
        "Q5_0": (22, _q5_0),
        "Q5_1": (24, _q5_1),
        "Q8_0": (34, _q8_0),
        "Q4_K": (144, _q4_k),
        "Q5_K": (176, _q5_k),
        "Q6_K": (210, _q6_k),
        "I4_64": (36, _q4_1),
        "I4_128": (68, _q4_1),
        "I8_32": (36, _i8),
        "Z4_32": (21, _z4),
        "Z4_64": (37, _z4),
        "Z4_128": (69, _z4),
        "Z8_32": (37, _z8),
    }[format_name]
    rows, row_bytes = blocks.shape
    if row_bytes % block_bytes:
        raise RuntimeError(f"dequantize: rows must hold whole {format_name} blocks of {block_bytes} bytes")
    expanded = expand(blocks.reshape(rows * (row_bytes // block_bytes), block_bytes))
    return expanded.reshape(rows, row_bytes // block_bytes * expanded.shape[1])


def read_floats(data: torch.Tensor) -> torch.Tensor:
    """Four bytes, wherever they lie, as one float32. uint8 [..., 4] to [..., 1]."""
    return data.clone(memory_format=torch.contiguous_format).view(torch.float32)


def _half(data: torch.Tensor) -> torch.Tensor:
    """Two bytes per block as one float16, widened. [n, 2] to [n, 1] float32."""
    return data.contiguous().view(torch.float16).float()


def _nibbles(data: torch.Tensor) -> torch.Tensor:
    """Low nibbles of all bytes, then their high nibbles. [n, k] to [n, 2k]."""
    return torch.cat((data & 15, data >> 4), dim=-1)


def _bits(data: torch.Tensor) -> torch.Tensor:
    """The 32 bits of four bytes, lowest first. [n, 4] to [n, 32]."""
    shifts = torch.arange(8, dtype=torch.uint8, device=data.device)
    return ((data.unsqueeze(-1) >> shifts) & 1).flatten(-2)


def _q4_0(b: torch.Tensor) -> torch.Tensor:
    return _half(b[:, :2]) * (_nibbles(b[:, 2:]).float() - 8)


def _q4_1(b: torch.Tensor) -> torch.Tensor:
    """Also of longer blocks, whose scale and offset serve several runs of 32 weights."""
    runs = _nibbles(b[:, 4:].unflatten(1, (-1, 16)))  # [n, runs, 32]
    return _half(b[:, :2]) * runs.flatten(1).float() + _half(b[:, 2:4])


def _i8(b: torch.Tensor) -> torch.Tensor:
    return _half(b[:, :2]) * b[:, 4:].float() + _half(b[:, 2:4])


def _z4(b: torch.Tensor) -> torch.Tensor:
    """float32 scale, zero point, then runs of 32 weights."""
    codes = _nibbles(b[:, 5:].unflatten(1, (-1, 16))).flatten(1)
    return read_floats(b[:, :4]) * (codes.float() - b[:, 4:5].float())


def _z8(b: torch.Tensor) -> torch.Tensor:
    return read_floats(b[:, :4]) * (b[:, 5:].float() - b[:, 4:5].float())


def _q5_0(b: torch.Tensor) -> torch.Tensor:
    return _half(b[:, :2]) * ((_nibbles(b[:, 6:]) | (_bits(b[:, 2:6]) << 4)).float() - 16)


def _q5_1(b: torch.Tensor) -> torch.Tensor:
    return _half(b[:, :2]) * (_nibbles(b[:, 8:]) | (_bits(b[:, 4:8]) << 4)).float() + _half(b[:, 2:4])


def _q8_0(b: torch.Tensor) -> torch.Tensor:
    return _half(b[:, :2]) * b[:, 2:].contiguous().view(torch.int8).float()


def _k_scales(b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Six-bit scales and minimums of a K block's eight sub-blocks, out of 12 bytes. [n, 8] each."""
    low, mid, high = b[:, 0:4], b[:, 4:8], b[:, 8:12]
    scales = torch.cat((low & 63, (high & 15) | ((low >> 6) << 4)), dim=-1)
    minimums = torch.cat((mid & 63, (high >> 4) | ((mid >> 6) << 4)), dim=-1)
    return scales.float(), minimums.float()


def _k_nibbles(b: torch.Tensor) -> torch.Tensor:
    """[n, 128] bytes to [n, 8, 32]: each run of 32 bytes holds two sub-blocks, low then high nibbles."""
    runs = b.unflatten(-1, (4, 32))
    return torch.stack((runs & 15, runs >> 4), dim=2).flatten(1, 2)


def _k_combine(b: torch.Tensor, quants: torch.Tensor) -> torch.Tensor:
    scales, minimums = _k_scales(b[:, 4:16])
    scale = (_half(b[:, 0:2]) * scales).unsqueeze(-1)  # [n, 8, 1]
    minimum = (_half(b[:, 2:4]) * minimums).unsqueeze(-1)
    return (scale * quants.float() - minimum).flatten(1)


def _q4_k(b: torch.Tensor) -> torch.Tensor:
    return _k_combine(b, _k_nibbles(b[:, 16:]))


def _q5_k(b: torch.Tensor) -> torch.Tensor:
    shifts = torch.arange(8, dtype=torch.uint8, device=b.device).view(1, 8, 1)
    fifth = ((b[:, 16:48].unsqueeze(1) >> shifts) & 1) << 4  # [n, 8, 32]
    return _k_combine(b, _k_nibbles(b[:, 48:]) | fifth)


def _q6_k(b: torch.Tensor) -> torch.Tensor:
    low = b[:, :128].unflatten(-1, (2, 64))  # two halves of 128 weights
    low = torch.cat((low & 15, low >> 4), dim=-1).unflatten(-1, (4, 32))  # [n, 2, 4, 32]
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=b.device).view(1, 1, 4, 1)
    high = (b[:, 128:192].unflatten(-1, (2, 1, 32)) >> shifts) & 3
    quants = (low | (high << 4)).float() - 32
    scales = b[:, 192:208].contiguous().view(torch.int8).float()
    scale = (_half(b[:, 208:210]) * scales).unsqueeze(-1)  # [n, 16, 1]
    weights: torch.Tensor = scale * quants.reshape(-1, 16, 16)
    return weights.flatten(1)
