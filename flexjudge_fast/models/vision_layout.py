"""How the patches of some media lie in a vision tower: window order, segments, two-dimensional positions."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from flexjudge_fast.models.vision_config import VisionConfig

Grid = tuple[int, int, int]  # patches over time, height and width


@dataclass(frozen=True, eq=False)
class VisionLayout:
    """Of all media together. A unit is the patches of one merged embedding, which lie side by side."""

    order: (
        torch.Tensor
    )  # [num_units] int64: which unit comes first, second, ... so that windows are in one piece
    windows: torch.Tensor  # int64 offsets [num_windows + 1], in patches
    frames: torch.Tensor  # int64 offsets [num_frames + 1], in patches
    cos: torch.Tensor  # [num_patches, head_dim / 2] float32, in window order
    sin: torch.Tensor


def lay_out(grids: Sequence[Grid], config: VisionConfig) -> VisionLayout:
    """The layout of media of these grids, one after the other."""
    orders, windows, frames, positions = [], [], [], []
    first = 0
    for grid in grids:
        order, sizes = _windows(grid, config)
        orders.append(order + first)
        windows.append(sizes)
        frames.append(torch.full((grid[0],), grid[1] * grid[2]))
        positions.append(_positions(grid, config.merge_size))
        first += len(order)
    order = torch.cat(orders)
    units = torch.cat(positions).unflatten(0, (-1, config.merged_patches))[order]  # [num_units, merged, 2]
    cos, sin = _angles(units.flatten(0, 1), config.head_dim)
    return VisionLayout(order, _offsets(torch.cat(windows)), _offsets(torch.cat(frames)), cos, sin)


def _windows(grid: Grid, config: VisionConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """One medium's units window by window, and the windows' sizes in patches.

    Windows start at the upper left of every frame; those at its right and lower edges are smaller.
    """
    side = config.window_size // config.merge_size // config.patch_size
    time, height, width = grid[0], grid[1] // config.merge_size, grid[2] // config.merge_size
    units = torch.arange(time * height * width).view(time, height, width)
    pieces = [
        window.flatten()
        for frame in units
        for rows in frame.split(side)
        for window in rows.split(side, dim=1)
    ]
    sizes = torch.tensor([len(piece) for piece in pieces]) * config.merged_patches
    return torch.cat(pieces), sizes


def _positions(grid: Grid, merge: int) -> torch.Tensor:
    """Row and column of every patch of one medium, [num_patches, 2], unit by unit."""
    time, height, width = grid
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    units = (height // merge, merge, width // merge, merge)
    flat = [x.view(units).permute(0, 2, 1, 3).flatten() for x in (rows, columns)]
    return torch.stack(flat, dim=-1).repeat(time, 1)


def _angles(positions: torch.Tensor, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of [num_patches, 2] positions: half of the pairs turn by row, half by column."""
    half = head_dim // 2
    inv_freq = 1.0 / (10000.0 ** (torch.arange(0, half, 2, dtype=torch.float32) / half))
    angles = (positions[..., None].float() * inv_freq).flatten(1)  # [num_patches, head_dim / 2]
    return angles.cos(), angles.sin()


def _offsets(sizes: torch.Tensor) -> torch.Tensor:
    return torch.cat((torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)))
