"""Reads images and videos in threads, ahead of the model that judges them."""

import os
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import numpy as np
from numpy.typing import NDArray

from flexjudge_fast.media.image import load_image, prepare_image
from flexjudge_fast.media.image_file import ImageLimits
from flexjudge_fast.media.items import MediaItem, MediaOptions
from flexjudge_fast.media.keys import media_key
from flexjudge_fast.media.prepared import PreparedMedia
from flexjudge_fast.media.video import decode_video
from flexjudge_fast.media.video_pool import DecodedVideo, VideoDecoder
from flexjudge_fast.media.video_sampling import FrameBudget
from flexjudge_fast.media.vision_processor import VisionProcessor


class MediaReader:
    """Decodes, samples and resizes as `processor` says. Videos are decoded in processes of their own."""

    def __init__(self, processor: VisionProcessor) -> None:
        self._processor = processor
        self._threads = ThreadPoolExecutor(max(2, os.cpu_count() or 1), "flexjudge-media")
        self._videos = VideoDecoder()

    def submit(self, item: MediaItem, options: MediaOptions) -> "Future[PreparedMedia]":
        """Start to read; the future raises MediaError where it cannot be read."""
        read = self._video if item.kind == "video" else self._image
        return self._threads.submit(read, item, options)

    def close(self) -> None:
        """End threads and processes."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._videos.close()

    def _image(self, item: MediaItem, options: MediaOptions) -> PreparedMedia:
        return prepare_image(item, self._processor, options, b"")

    def _video(self, item: MediaItem, options: MediaOptions) -> PreparedMedia:
        load_frame = partial(_load_frame, options=options)
        video = decode_video(item, options, _budget(self._processor), self._videos, load_frame)
        grid = self._processor.grid(*video.frames.shape[:3])
        return PreparedMedia(
            kind="video",
            key=_video_key(video, self._processor),
            frames=video.frames,
            grid=grid,
            num_tokens=self._processor.num_tokens(grid),
            seconds_per_grid=video.seconds_per_grid,
        )


def _load_frame(item: MediaItem, options: MediaOptions) -> NDArray[np.uint8]:
    rgb, _ = load_image(item, ImageLimits(), options.allow_remote)
    return rgb


def _budget(p: VisionProcessor) -> FrameBudget:
    return FrameBudget(
        factor=p.factor,
        temporal=p.temporal_patch_size,
        min_pixels=p.video_min_pixels,
        max_pixels=p.video_max_pixels,
        total_pixels=p.video_total_pixels,
        min_frames=p.min_frames,
        max_frames=p.max_frames,
        fps=p.fps,
    )


def _video_key(video: DecodedVideo, processor: VisionProcessor) -> bytes:
    """Positions in the prompt come from `seconds_per_grid`, so what it is made of counts too."""
    return media_key(
        "video",
        mode=video.mode,
        size=video.size,
        pixels=video.digest,
        target=(video.frames.shape[1], video.frames.shape[2]),
        processor=processor,
        salt=b"",
        frame_indices=video.indices,
        times=(*video.times, video.seconds_per_grid),
        fps=video.fps,
    )
