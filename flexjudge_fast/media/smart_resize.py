"""Qwen's rule for the size of an image or frame: whole patches, limits on the pixels, the shape kept."""

import math

from flexjudge_fast.errors import MediaError

MAX_ASPECT_RATIO = 200


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The height and width nearest to the given ones that are multiples of `factor`, within the limits.

    Equal to transformers' for all inputs, rounding included. A side never falls below `factor`, so that an
    image may exceed a max_pixels that leaves no room for its aspect ratio.

    Raises:
        MediaError: a side is 0, or one is more than 200 times the other.
    """
    if min(height, width) < 1:
        raise MediaError(f"{width} x {height} pixels is not an image")
    if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise MediaError(
            f"{width} x {height} pixels: one side is more than {MAX_ASPECT_RATIO} times the other"
        )
    rounded = round(height / factor) * factor, round(width / factor) * factor
    if math.prod(rounded) > max_pixels:
        shrink = math.sqrt((height * width) / max_pixels)
        down = [max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width)]
        return down[0], down[1]
    if math.prod(rounded) < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        up = [math.ceil(side * grow / factor) * factor for side in (height, width)]
        return up[0], up[1]
    return rounded
