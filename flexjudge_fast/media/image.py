"""Images from any source to resized RGB pixels: what every kind of pixel becomes is defined here."""

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from flexjudge_fast.errors import MediaError
from flexjudge_fast.media.image_file import DEFAULT_LIMITS, ImageLimits, decode_image
from flexjudge_fast.media.items import MediaItem, MediaOptions
from flexjudge_fast.media.keys import media_key, pixel_digest
from flexjudge_fast.media.prepared import PreparedMedia
from flexjudge_fast.media.source import describe, read_source
from flexjudge_fast.media.vision_processor import VisionProcessor
from flexjudge_fast.ops.image import resize_bicubic

Pixels = NDArray[np.uint8]

_STRIP_PIXELS = 1 << 18  # converted at a time, so that copies in other modes stay small
_ORIENTATION = 0x0112  # EXIF tag
_ARRAY_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # by channels
_REFUSED_MODES = {"F": "floats have no defined range", "LAB": "LAB colours are not converted"}


def prepare_image(
    item: MediaItem,
    processor: VisionProcessor,
    options: MediaOptions,
    salt: bytes,
    limits: ImageLimits = DEFAULT_LIMITS,
    threads: int = 1,
) -> PreparedMedia:
    """An image read, resized and named by its content. Safe to call from several threads.

    Args:
        item: see `load_image`.
        salt: what the embeddings depend on beside pixels and processor: the model, its dtype.

    Raises:
        MediaError: it cannot be read, or a limit is passed; the message begins with item.name.
        InvalidArgumentError: the options make no sense.
    """
    rgb, mode = load_image(item, limits, options.allow_remote)
    height, width = rgb.shape[:2]
    try:
        target = processor.target_size(height, width, options)
        limits.check_size(target[1], target[0])
    except MediaError as error:
        raise _named(item, error) from None
    key = media_key(
        "image",
        mode=mode,
        size=(height, width),
        pixels=pixel_digest([rgb]),
        target=target,
        processor=processor,
        salt=salt,
    )
    frames = resize_bicubic(torch.from_numpy(rgb).unsqueeze(0), *target, threads).numpy()
    grid = processor.grid(1, *target)
    return PreparedMedia("image", key, frames, grid, processor.num_tokens(grid))


def load_image(item: MediaItem, limits: ImageLimits, allow_remote: bool) -> tuple[Pixels, str]:
    """An image as RGB pixels, uint8 [height, width, 3], and the mode that it was stored in (Pillow's name).

    Sources: a path, bytes, a `data:` URL in base64, an http(s) URL if `allow_remote`, a PIL image, or a uint8
    array [height, width], [height, width, 1], [height, width, 3] (RGB) or [height, width, 4] (RGBA).

    - EXIF orientation is applied, of PIL images too; broken EXIF data count as none.
    - Alpha, of pixels or of a palette or as a transparent colour, is laid over white.
    - Grey becomes three equal channels; 16-bit grey is divided by 257 and rounded. PNG's 16-bit colours are
      cut to their upper 8 bits, as Pillow does.
    - CMYK, YCbCr and HSV are converted by Pillow's formulas; colour profiles are ignored.
    - Of several frames or pages the first is taken.
    - Float and LAB images are refused, as are 32-bit integers beyond 16 bits.

    Raises:
        MediaError: beginning with item.name and a description of the source.
    """
    source = item.source
    try:
        if isinstance(source, np.ndarray):
            return _from_array(source, limits)
        if isinstance(source, Image.Image):
            limits.check_size(*source.size)
            image = source
        else:
            image = decode_image(read_source(source, limits.file_bytes, allow_remote), limits)
        rgb, mode, orientation = _to_rgb(image), image.mode, _orientation(image)
        del image  # before pixels are copied again
        return _oriented(rgb, orientation), mode
    except Exception as error:  # of a broken file Pillow raises nearly every kind of exception
        raise _named(item, error) from (None if isinstance(error, MediaError) else error)


def _named(item: MediaItem, error: Exception) -> MediaError:
    """`error` with the medium's name and source before it."""
    if isinstance(error, MediaError):
        reason = str(error)
    elif isinstance(error, OSError) and error.strerror:
        reason = error.strerror
    else:
        reason = f"it cannot be decoded: {type(error).__name__}: {error!s:.200}"
    return MediaError(": ".join(part for part in (item.name, describe(item.source), reason) if part))


def _from_array(array: NDArray[np.generic], limits: ImageLimits) -> tuple[Pixels, str]:
    shaped = array[:, :, None] if array.ndim == 2 else array
    if array.dtype != np.uint8 or shaped.ndim != 3 or shaped.shape[2] not in _ARRAY_MODES:
        raise MediaError(
            f"an array must be uint8 [height, width] or [height, width, 1, 3 or 4], "
            f"not {array.dtype} {list(array.shape)}"
        )
    height, width, channels = shaped.shape
    limits.check_size(width, height)
    mode = _ARRAY_MODES[channels]
    pixels = np.asarray(shaped, dtype=np.uint8)
    if channels == 4:
        return _over_white(pixels), mode
    return np.array(np.broadcast_to(pixels, (height, width, 3))), mode  # a copy, which nobody else changes


def _over_white(rgba: Pixels) -> Pixels:
    """uint8 [height, width, 4] over white, rounded to nearest: uint8 [height, width, 3]."""
    alpha = rgba[..., 3:].astype(np.uint16)
    mixed = rgba[..., :3] * alpha + 255 * (255 - alpha)  # at most 255 * 255
    return ((mixed + 127) // 255).astype(np.uint8)


def _to_rgb(image: Image.Image) -> Pixels:
    if image.mode in _REFUSED_MODES:
        raise MediaError(f"mode {image.mode}: {_REFUSED_MODES[image.mode]}")
    image.load()
    out = np.empty((image.height, image.width, 3), dtype=np.uint8)
    rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        out[top : top + rows] = _strip_to_rgb(strip)
    return out


def _strip_to_rgb(strip: Image.Image) -> Pixels:
    """uint8 [height, width, 3], or [height, width, 1] of a grey image."""
    if strip.mode == "I" or strip.mode.startswith("I;16"):
        values = np.asarray(strip).astype(np.int64)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise MediaError(f"mode {strip.mode}: values beyond 0 to 65,535 have no defined range")
        return ((values + 128) // 257).astype(np.uint8)[..., None]
    if strip.has_transparency_data:
        return _over_white(np.asarray(strip.convert("RGBA")))
    return np.asarray(strip if strip.mode == "RGB" else strip.convert("RGB"))


def _orientation(image: Image.Image) -> int:
    try:
        found = image.getexif().get(_ORIENTATION)
    except Exception:  # broken EXIF data are no reason to refuse pixels that are sound
        return 1
    return found if isinstance(found, int) else 1


def _oriented(rgb: Pixels, orientation: int) -> Pixels:
    """Turned and mirrored as EXIF's `orientation` asks for."""
    if orientation in (5, 6, 7, 8):
        rgb = rgb.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        rgb = rgb[::-1]
    if orientation in (2, 3, 6, 7):
        rgb = rgb[:, ::-1]
    return np.ascontiguousarray(rgb)
