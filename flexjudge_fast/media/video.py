"""A video as the caller gave it, file or frames, to sampled and resized frames."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flexjudge_fast.errors import MediaError
from flexjudge_fast.media.items import MediaItem, MediaOptions
from flexjudge_fast.media.source import describe as describe_source
from flexjudge_fast.media.video_limits import VideoLimits
from flexjudge_fast.media.video_pool import DecodedVideo, VideoDecoder
from flexjudge_fast.media.video_sampling import FrameBudget, frames_digest

FrameLoader = Callable[[MediaItem], NDArray[np.uint8]]
"""An image in any form that images may have, to uint8 [height, width, 3] RGB; raises MediaError."""


def decode_video(
    item: MediaItem,
    options: MediaOptions,
    budget: FrameBudget,
    decoder: VideoDecoder,
    load_frame: FrameLoader,
) -> DecodedVideo:
    """Decodes a video file (path or bytes) in another process, or takes frames as they are.

    Frames are a list of images (arrays uint8 [height, width, 3], or whatever `load_frame` reads) or an array
    uint8 [num_frames, height, width, 3], taken at `options.fps` or the model's rate.

    Raises:
        MediaError: it is broken, empty or over a limit; the message begins with the item's name.
        InvalidArgumentError: the options ask for no pixels or no frames.
    """
    budget = budget.with_options(options)
    source = item.source
    try:
        if isinstance(source, str) and source.lower().startswith(("http://", "https://")):
            raise MediaError("videos are not fetched from the network; give a path or bytes")
        if isinstance(source, (str, os.PathLike, bytes, bytearray, memoryview)):
            return decoder.decode(source, budget)
        if isinstance(source, (list, tuple)) or (isinstance(source, np.ndarray) and source.ndim == 4):
            return take_frames(item, source, budget, decoder.limits, load_frame)
        raise MediaError("give a path, bytes, a list of frames, or an array [num_frames, height, width, 3]")
    except MediaError as error:
        if item.name and str(error).startswith(item.name):
            raise  # one frame of a list, which has a name of its own
        raise MediaError(f"{item.name or 'video'}: {_describe(source)}: {error}") from error


def take_frames(
    item: MediaItem,
    source: Sequence[Any] | NDArray[Any],
    budget: FrameBudget,
    limits: VideoLimits,
    load_frame: FrameLoader,
) -> DecodedVideo:
    """Resizes frames that were given one by one. MediaError: none, too many, too large, of several sizes."""
    count = len(source)
    if not 0 < count <= budget.max_frames:
        raise MediaError(f"{count} frames; give 1 to {budget.max_frames}")
    frames: NDArray[np.uint8] = np.empty((count, 0, 0, 3), np.uint8)
    size, digest = (0, 0), frames_digest(0, 0)
    for i, given in enumerate(source):
        frame = _frame(MediaItem("image", given, f"{item.name}[{i}]"), load_frame)
        height, width = frame.shape[:2]
        if i == 0:
            limits.check_size(width, height)
            size, digest = (width, height), frames_digest(width, height)
            frames = np.empty((count, *_target(budget, limits, size, count), 3), np.uint8)
        if (width, height) != size:
            raise MediaError(f"frame {i} is {width}x{height}, the first {size[0]}x{size[1]}; give one size")
        digest.update(frame.data)
        target = (frames.shape[2], frames.shape[1])
        resized = Image.fromarray(frame).resize(target, Image.Resampling.BICUBIC)
        frames[i] = np.asarray(resized)
    return DecodedVideo(
        frames,
        digest.digest(),
        size,
        mode="RGB",
        indices=tuple(range(count)),
        times=tuple(i / budget.fps for i in range(count)),
        fps=budget.fps,
        sample_fps=budget.fps,
        seconds_per_grid=budget.temporal / budget.fps,
    )


def _frame(item: MediaItem, load_frame: FrameLoader) -> NDArray[np.uint8]:
    """uint8 [height, width, 3], contiguous."""
    array = item.source if isinstance(item.source, np.ndarray) else load_frame(item)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        shape = list(array.shape)
        raise MediaError(f"{item.name}: {array.dtype} {shape}; a frame is uint8 [height, width, 3]")
    return np.ascontiguousarray(array)


def _target(budget: FrameBudget, limits: VideoLimits, size: tuple[int, int], count: int) -> tuple[int, int]:
    target = budget.frame_size(size[1], size[0], count)
    limits.check_output(count, *target)
    return target


def _describe(source: object) -> str:
    """A source in a few words, for messages."""
    if isinstance(source, np.ndarray):
        return f"{source.dtype} {list(source.shape)}"
    if isinstance(source, list | tuple):
        return f"{len(source)} frames"
    return describe_source(source)
