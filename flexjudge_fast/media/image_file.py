"""Opens and decodes image files that nobody vouches for, within limits that are checked before each step."""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO

from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from flexjudge_fast.errors import MediaError
from flexjudge_fast.media.smart_resize import MAX_ASPECT_RATIO


@dataclass(frozen=True)
class ImageLimits:
    """What an image may cost.

    Args:
        file_bytes: of the encoded file.
        side: pixels of the longer side.
        pixels: of the whole image.
        aspect_ratio: longer side over shorter side.
        memory_bytes: that reading and decoding take at their peak, by the format's bytes per pixel.
        slow_pixels: pixels of the rare kinds that Pillow decodes in Python: run-length coded BMP, and PPM as
            text or with an odd range.
        scan_pixels: pixels times scans of a progressive JPEG, each of which goes through the whole image.
        reads: of a file's pieces; Pillow goes through them in Python, some 400,000 a second.
    """

    file_bytes: int = 64 << 20
    side: int = 1 << 16
    pixels: int = 1 << 25
    aspect_ratio: int = MAX_ASPECT_RATIO
    memory_bytes: int = 240 << 20
    slow_pixels: int = 1 << 20
    scan_pixels: int = 1 << 30
    reads: int = 1 << 17

    def check_size(self, width: int, height: int) -> None:
        """MediaError unless an image of this size may be decoded."""
        if min(width, height) < 1:
            raise MediaError(f"{width} x {height} pixels is not an image")
        if max(width, height) > self.side:
            raise MediaError(f"{width} x {height} pixels: a side is longer than {self.side:,}")
        if width * height > self.pixels:
            raise MediaError(f"{width} x {height} pixels are more than the {self.pixels:,} allowed")
        if max(width, height) > self.aspect_ratio * min(width, height):
            raise MediaError(f"{width} x {height} pixels: the aspect ratio exceeds {self.aspect_ratio}")

    def check_memory(self, size: tuple[int, int], file_bytes: int, bytes_per_pixel: int) -> None:
        needed = file_bytes + size[0] * size[1] * bytes_per_pixel
        if needed > self.memory_bytes:
            raise MediaError(
                f"{size[0]} x {size[1]} pixels: decoding takes {needed:,} bytes, "
                f"more than the {self.memory_bytes:,} allowed"
            )


DEFAULT_LIMITS = ImageLimits()


class _CountedFile(BytesIO):
    """A file in memory that ends the work of whoever reads it in too many pieces."""

    def __init__(self, data: bytes, limits: ImageLimits):
        super().__init__(data)
        self._limit = self._left = limits.reads

    def read(self, size: int | None = -1, /) -> bytes:
        self._left -= 1
        if self._left < 0:
            raise MediaError(f"it is cut into more than {self._limit:,} pieces")
        return super().read(size)


@dataclass(frozen=True)
class _Format:
    """`bytes_per_pixel`: at the peak of decoding and of the conversion to RGB, measured and rounded up."""

    name: str
    begins: tuple[bytes, ...]
    open: Callable[[BytesIO], Image.Image]
    bytes_per_pixel: int


_FORMATS = (
    _Format("JPEG", (b"\xff\xd8\xff",), JpegImagePlugin.JpegImageFile, 8),
    _Format("PNG", (b"\x89PNG\r\n\x1a\n",), PngImagePlugin.PngImageFile, 8),
    _Format("GIF", (b"GIF87a", b"GIF89a"), GifImagePlugin.GifImageFile, 8),
    _Format("BMP", (b"BM",), BmpImagePlugin.BmpImageFile, 8),
    _Format("TIFF", (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), TiffImagePlugin.TiffImageFile, 10),
    _Format("WEBP", (b"RIFF",), WebPImagePlugin.WebPImageFile, 20),
    _Format("PPM", (b"P1", b"P2", b"P3", b"P4", b"P5", b"P6"), PpmImagePlugin.PpmImageFile, 8),
)
_PROGRESSIVE_JPEG = 12  # bytes per pixel: all coefficients are held until the last scan
_SLOW_DECODERS = ("bmp_rle", "ppm_plain", "ppm")
_SCAN = b"\xff\xda"
_TILE_WIDTH, _TILE_LENGTH = 322, 323


def decode_image(data: bytes, limits: ImageLimits) -> Image.Image:
    """The first picture of a JPEG, PNG, WEBP, GIF, BMP, TIFF or PPM file, decoded.

    Pillow's classes are called by name and not through `Image.open`, which would try other formats, warn
    about large images, and obey global settings of whoever shares the process.

    Raises:
        MediaError: a limit is passed. What Pillow makes of a broken file is raised as it is: any Exception.
    """
    found = next((f for f in _FORMATS if data.startswith(f.begins)), None)
    if found is None:
        raise MediaError(f"it is none of {', '.join(f.name for f in _FORMATS)}")
    if found.name == "WEBP":  # its decoder makes room for the picture as soon as it is opened
        size = _webp_size(data)
        limits.check_size(*size)
        limits.check_memory(size, len(data), found.bytes_per_pixel)
    image = found.open(_CountedFile(data, limits))
    limits.check_size(*image.size)
    progressive = found.name == "JPEG" and "progressive" in image.info
    limits.check_memory(image.size, len(data), _PROGRESSIVE_JPEG if progressive else found.bytes_per_pixel)
    _check_time(image, data, limits)
    image.load()
    limits.check_size(*image.size)
    return image


def _check_time(image: Image.Image, data: bytes, limits: ImageLimits) -> None:
    """Kinds of files that take long although they are small."""
    pixels = image.width * image.height
    if isinstance(image, JpegImagePlugin.JpegImageFile):
        scans = data.count(_SCAN)
        if scans * pixels > limits.scan_pixels:
            raise MediaError(
                f"{image.width} x {image.height} pixels in {scans} scans take too long to decode"
            )
    if isinstance(image, TiffImagePlugin.TiffImageFile) and _TILE_WIDTH in image.tag_v2:
        tile = int(image.tag_v2[_TILE_WIDTH]), int(image.tag_v2.get(_TILE_LENGTH, 1))
        if max(tile) > limits.side or tile[0] * tile[1] > max(4 * pixels, 1 << 20):
            raise MediaError(f"its tiles of {tile[0]} x {tile[1]} pixels are far larger than the image")
    codecs = {str(tile[0]) for tile in getattr(image, "tile", ())}
    if codecs & set(_SLOW_DECODERS) and max(pixels, len(data) // 16) > limits.slow_pixels:
        raise MediaError(f"this kind of {image.format} is read up to {limits.slow_pixels:,} pixels only")


def _webp_size(data: bytes) -> tuple[int, int]:
    """Width and height from a WEBP's header."""
    kind, body = data[12:16], data[20:30]
    if data[8:12] != b"WEBP" or len(body) < 10:
        raise MediaError("its WEBP header is broken")
    if kind == b"VP8X":
        wide, high = int.from_bytes(body[4:7], "little"), int.from_bytes(body[7:10], "little")
        return wide + 1, high + 1
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", body, 6)
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    raise MediaError("its WEBP header is broken")
