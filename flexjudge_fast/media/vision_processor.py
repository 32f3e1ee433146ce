"""How a checkpoint wants images and videos resized and normalised: its preprocessor configuration, read."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flexjudge_fast.errors import InvalidArgumentError
from flexjudge_fast.media.items import MediaOptions
from flexjudge_fast.media.smart_resize import smart_resize
from flexjudge_fast.weights.processor_config import ProcessorConfig

Color = tuple[float, float, float]

_BICUBIC = 3  # Pillow's number
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# What is done to an image, and what is not; anything else would change the pixels.
_STEPS = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_convert_rgb": True,
    "do_center_crop": False,
    "do_pad": False,
}
_LEAST, _MOST = ("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")
_LONGEST = 1 << 20  # of any count of pixels' side, patches or frames; keeps products within 64 bits
_MOST_PIXELS = 1 << 40


@dataclass(frozen=True)
class VisionProcessor:
    """Sizes in pixels, limits per image or per frame of a video.

    Args:
        patch_size, temporal_patch_size: pixels and frames of a patch.
        merge_size: a block of merge_size x merge_size patches becomes one token.
        min_pixels, max_pixels: of an image after resizing.
        mean, std: by channel, of values that were multiplied by rescale_factor.
        video_min_pixels, video_max_pixels: of a frame; the defaults from here on are those of qwen_vl_utils.
        video_total_pixels: of all frames of a video.
        min_frames, max_frames: taken from a video.
        fps: frames taken per second.
    """

    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    mean: Color = _CLIP_MEAN
    std: Color = _CLIP_STD
    rescale_factor: float = 1 / 255
    video_min_pixels: int = 128 * 28 * 28
    video_max_pixels: int = 768 * 28 * 28
    video_total_pixels: int = int(24576 * 28 * 28 * 0.9)
    min_frames: int = 4
    max_frames: int = 768
    fps: float = 2.0

    @property
    def factor(self) -> int:
        """Pixels of a token's side: heights and widths are multiples of it."""
        return self.patch_size * self.merge_size

    def normalization_table(self) -> NDArray[np.float32]:
        """float32 [3, 256]: what each byte of each channel becomes.

        Rounded as transformers does: rescaled in float64, then normalised in float32.
        """
        rescaled = (np.arange(256, dtype=np.float64) * self.rescale_factor).astype(np.float32)
        mean = np.array(self.mean, dtype=np.float32)[:, None]
        std = np.array(self.std, dtype=np.float32)[:, None]
        return (rescaled - mean) / std

    def target_size(self, height: int, width: int, options: MediaOptions) -> tuple[int, int]:
        """Height and width that an image is resized to. MediaError as of `smart_resize`."""
        min_pixels, max_pixels = self.min_pixels, self.max_pixels
        if options.max_pixels is not None:
            if options.max_pixels < 1:
                raise InvalidArgumentError(f"max_pixels must be at least 1, not {options.max_pixels}")
            max_pixels = options.max_pixels
            min_pixels = min(min_pixels, max_pixels)
        if options.resize is not None:
            width, height = options.resize
            if min(options.resize) < 1 or max(options.resize) > _LONGEST:
                raise InvalidArgumentError(f"resize must be 1 to {_LONGEST} pixels, not {options.resize}")
        return smart_resize(height, width, self.factor, min_pixels, max_pixels)

    def grid(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Patches over time, height and width of frames that were resized."""
        return -(-num_frames // self.temporal_patch_size), height // self.patch_size, width // self.patch_size

    def num_tokens(self, grid: tuple[int, int, int]) -> int:
        """Embeddings that the encoder makes of a grid."""
        return math.prod(grid) // self.merge_size**2


def read_vision_processor(image: ProcessorConfig, video: ProcessorConfig) -> VisionProcessor:
    """From the settings for images and those for videos.

    All published styles are read: min_pixels and max_pixels, alone or within size, or size with shortest_edge
    and longest_edge.
    Frames of a video are resized by qwen_vl_utils' limits, then by the video configuration's: the narrower of
    the two are kept.

    Raises:
        UnsupportedCheckpointError: a field asks for something else than this version computes, or is no sound
            value; the message names file and field.
    """
    fields, moving = (_Fields(config.where, config.fields) for config in (image, video))
    base = VisionProcessor()
    for given in (fields, moving):
        given.check_steps()
    min_pixels, max_pixels = fields.limits(base.min_pixels, base.max_pixels)
    low, high = moving.limits(1, base.video_max_pixels)
    found = VisionProcessor(
        patch_size=fields.count("patch_size", base.patch_size),
        temporal_patch_size=fields.count("temporal_patch_size", base.temporal_patch_size),
        merge_size=fields.count("merge_size", base.merge_size),
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        mean=fields.color("image_mean", base.mean),
        std=fields.color("image_std", base.std),
        rescale_factor=fields.positive("rescale_factor", base.rescale_factor),
        video_min_pixels=min(max(low, base.video_min_pixels), high),
        video_max_pixels=min(high, base.video_max_pixels),
        min_frames=moving.count("min_frames", base.min_frames),
        max_frames=moving.count("max_frames", base.max_frames),
        fps=moving.positive("fps", base.fps),
    )
    if 0 in found.std:
        raise fields.wrong("image_std", "0 cannot be divided by")
    if found.min_frames > found.max_frames:
        raise moving.wrong("min_frames", f"{found.min_frames} is more than max_frames")
    _check_same(found, fields, moving)
    return found


def _check_same(processor: VisionProcessor, image: "_Fields", video: "_Fields") -> None:
    """What images and videos share must not differ."""
    own = processor
    shared = {
        "patch_size": (own.patch_size, video.count("patch_size", own.patch_size)),
        "temporal_patch_size": (
            own.temporal_patch_size,
            video.count("temporal_patch_size", own.temporal_patch_size),
        ),
        "merge_size": (own.merge_size, video.count("merge_size", own.merge_size)),
        "image_mean": (own.mean, video.color("image_mean", own.mean)),
        "image_std": (own.std, video.color("image_std", own.std)),
        "rescale_factor": (own.rescale_factor, video.positive("rescale_factor", own.rescale_factor)),
    }
    for name, (wanted, given) in shared.items():
        if given != wanted:
            raise video.wrong(name, f"{given!r}, but {wanted!r} in {image.where}")


class _Fields(ProcessorConfig):
    """Of images or of videos."""

    def check_steps(self) -> None:
        for name, wanted in _STEPS.items():
            given = self.fields.get(name)
            if given is not None and given is not wanted:
                raise self.wrong(name, f"{given!r}, only {wanted} is supported")
        if self.fields.get("resample", _BICUBIC) not in (None, _BICUBIC):
            raise self.wrong(
                "resample", f"{self.fields['resample']!r}, only {_BICUBIC} (bicubic) is supported"
            )

    def count(self, name: str, default: int, most: int = _LONGEST) -> int:
        return super().count(name, default, most)

    def positive(self, name: str, default: float) -> float:
        value = self.fields.get(name)
        if value is None:
            return default
        if not _is_number(value) or value <= 0:
            raise self.wrong(name, f"{value!r:.50} is not a positive number")
        return float(value)

    def color(self, name: str, default: Color) -> Color:
        value = self.fields.get(name)
        if value is None:
            return default
        if not isinstance(value, (list, tuple)) or len(value) != 3 or not all(map(_is_number, value)):
            raise self.wrong(name, f"{value!r:.50} is not three numbers")
        return float(value[0]), float(value[1]), float(value[2])

    def limits(self, low: int, high: int) -> tuple[int, int]:
        """Least and most pixels; min_pixels and max_pixels go before size, as in transformers."""
        size = self.fields.get("size")
        if size is None:
            size = {}
        if not isinstance(size, Mapping) or not set(size) <= {*_LEAST, *_MOST}:
            raise self.wrong("size", f"{size!r:.80} is not shortest_edge and longest_edge")
        for name in _LEAST:
            low = self._count(f"size.{name}", size.get(name), low, _MOST_PIXELS)
        for name in _MOST:
            high = self._count(f"size.{name}", size.get(name), high, _MOST_PIXELS)
        low = self.count("min_pixels", low, _MOST_PIXELS)
        high = self.count("max_pixels", high, _MOST_PIXELS)
        if low > high:
            raise self.wrong("max_pixels", f"{high} is less than min_pixels, {low}")
        return low, high


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
