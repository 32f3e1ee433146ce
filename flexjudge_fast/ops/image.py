"""Resizes frames exactly as Pillow does, and cuts them into the patches that a vision encoder reads."""

import numpy as np
import torch
from PIL import Image

from flexjudge_fast.ops.backend import has_compiled_ops


def resize_bicubic(frames: torch.Tensor, height: int, width: int, threads: int = 1) -> torch.Tensor:
    """The bytes of Pillow's `resize((width, height), BICUBIC)` of each frame, as an RGB image.

    Pillow 13 it is: the versions before it resize along the width first always, which changes a few bytes of
    images that lose far more rows than columns.

    Args:
        frames: uint8 [num_frames, *, *, 3] on the CPU.
        height, width: of the result, 1 to 131,072 as the frames' own; else RuntimeError.
        threads: bits do not depend on it. One thread does not wait for a model that runs meanwhile.

    Returns:
        uint8 [num_frames, height, width, 3], a copy even where the size does not change.
    """
    if has_compiled_ops():
        out: torch.Tensor = torch.ops.flexjudge.resize_bicubic(frames.contiguous(), height, width, threads)
        return out
    return resize_bicubic_reference(frames, height, width)


def resize_bicubic_reference(frames: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The same by the Pillow that is installed."""
    if frames.dtype != torch.uint8 or frames.dim() != 4 or frames.shape[3] != 3:
        raise RuntimeError("resize_bicubic: frames must be uint8 [num_frames, height, width, 3]")
    if min(height, width, *frames.shape[1:3]) < 1:
        raise RuntimeError("resize_bicubic: height and width must be at least 1")
    out = torch.empty((len(frames), height, width, 3), dtype=torch.uint8)
    for to, frame in zip(out, frames, strict=True):
        resized = Image.fromarray(frame.contiguous().numpy()).resize(
            (width, height), Image.Resampling.BICUBIC
        )
        to.copy_(torch.from_numpy(np.array(resized)))
    return out


def patchify(
    frames: torch.Tensor,
    table: torch.Tensor,
    patch_size: int,
    merge_size: int,
    temporal_patch_size: int,
    threads: int = 1,
) -> torch.Tensor:
    """Normalised patches, in the order in which Qwen2-VL's encoder reads them.

    Args:
        frames: uint8 [num_frames, height, width, 3], at least one, height and width multiples of
            patch_size * merge_size; else RuntimeError. The last is repeated up to a multiple of
            temporal_patch_size.
        table: float32 [3, 256], the value of each byte in each channel.
        threads: bits do not depend on it.

    Returns:
        float32 [num_patches, 3 * temporal_patch_size * patch_size * patch_size]. Rows go through time, blocks
        of merge_size x merge_size patches, and the patches of a block; columns through channel, time, row
        and column.
    """
    sizes = (patch_size, merge_size, temporal_patch_size)
    if has_compiled_ops():
        out: torch.Tensor = torch.ops.flexjudge.patchify(
            frames.contiguous(), table.contiguous(), *sizes, threads
        )
        return out
    return patchify_reference(frames, table, *sizes)


def patchify_reference(
    frames: torch.Tensor, table: torch.Tensor, patch_size: int, merge_size: int, temporal_patch_size: int
) -> torch.Tensor:
    """The same in plain torch."""
    count, height, width = frames.shape[:3]
    unit = patch_size * merge_size
    if count == 0 or height % unit or width % unit:
        raise RuntimeError(f"patchify: a frame is needed, its height and width multiples of {unit}")
    frames = torch.cat((frames, frames[-1:].expand(-count % temporal_patch_size, -1, -1, -1)))
    values = torch.stack([table[c][frames[..., c].int()] for c in range(3)])  # [3, num_frames, height, width]
    split = values.reshape(
        3,
        -1,
        temporal_patch_size,
        height // unit,
        merge_size,
        patch_size,
        width // unit,
        merge_size,
        patch_size,
    )
    patches = split.permute(1, 3, 6, 4, 7, 0, 2, 5, 8)
    return patches.reshape(-1, 3 * temporal_patch_size * patch_size**2)
