"""Hostile image files: 10,000 mutations, lying headers, bombs. Each ends in pixels or a MediaError, soon."""

import io
import pickle
import random
import struct
import subprocess
import sys
import time
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from flexjudge_fast.errors import MediaError
from flexjudge_fast.media.image import prepare_image
from flexjudge_fast.media.items import MediaItem, MediaOptions
from flexjudge_fast.media.prepared import PreparedMedia
from flexjudge_fast.media.vision_processor import VisionProcessor

SMALL = VisionProcessor(max_pixels=56 * 56)
MUTATIONS = 10_000
SECONDS = 1.0  # of one file, on the processor's clock: others share the machine
INTERESTING = (0, 1, 0x7F, 0x80, 0xFF)


def encoded(image: Image.Image, name: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, name, **options)
    return out.getvalue()


def seeds() -> list[bytes]:
    """A small valid file of each format and of most of its kinds."""
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
    rgba = Image.fromarray(rng.integers(0, 256, (24, 32, 4), dtype=np.uint8))
    grey16 = Image.fromarray(rng.integers(0, 65536, (24, 32), dtype=np.uint16))
    exif = Image.Exif()
    exif[0x0112] = 6
    out = [encoded(rgb, name, exif=exif) for name in ("JPEG", "PNG", "WEBP", "TIFF")]
    out += [encoded(rgb, "JPEG", progressive=True), encoded(rgb.convert("CMYK"), "JPEG")]
    out += [encoded(rgba, "PNG"), encoded(grey16, "PNG"), encoded(rgb.quantize(16), "PNG", transparency=3)]
    out += [encoded(rgba, "WEBP", lossless=True), encoded(rgba, "WEBP", save_all=True, append_images=[rgba])]
    out += [encoded(rgb, "GIF"), encoded(rgba, "GIF", save_all=True, append_images=[rgb])]
    out += [encoded(rgb, "BMP"), encoded(rgb.quantize(16), "BMP"), encoded(rgb.convert("1"), "BMP")]
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits"):
        out.append(encoded(rgb, "TIFF", compression=compression))
    out += [encoded(grey16, "TIFF"), encoded(rgb.convert("1"), "TIFF", compression="group4")]
    out += [encoded(rgb, "PPM"), encoded(rgb.convert("L"), "PPM"), encoded(rgb.convert("1"), "PPM")]
    out += [b"P3 2 2 9\n" + b"1 2 3 4 5 6 7 8 9 9 8 7", b"P5 4 4 99\n" + bytes(range(16))]
    return [*out, rle_bmp()]


def rle_bmp(width: int = 16, height: int = 4, data: bytes = b"\x10\x01\0\0" * 4 + b"\0\1") -> bytes:
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(data), 0, 0, 256, 0)
    palette = bytes(1024)
    size = 14 + len(header) + len(palette)
    return b"BM" + struct.pack("<IHHI", size + len(data), 0, 0, size) + header + palette + data


def mutated(chance: random.Random, files: list[bytes]) -> bytes:
    """One to four of: bits, bytes and lengths changed, pieces cut, doubled, or taken from another file."""
    data = bytearray(chance.choice(files))
    head = chance.random() < 0.5  # headers decide most; the rest of the file is mostly pixels
    for _ in range(chance.randint(1, 4)):
        if not data:
            break
        at = chance.randrange(min(len(data), 64) if head else len(data))
        kind = chance.randrange(7)
        if kind == 0:
            data[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            data[at] = chance.choice(INTERESTING)
        elif kind == 2:
            data[at : at + 4] = chance.choice(
                [b"\xff" * 4, b"\x7f\xff\xff\xff", b"\0\0\0\0", b"\0\0\xff\xff"]
            )
        elif kind == 3:
            del data[at:]
        elif kind == 4:
            del data[at : at + chance.randint(1, 32)]
        elif kind == 5:
            piece = data[at : at + chance.randint(1, 64)]
            data[at:at] = piece * chance.choice([1, 2, 50])
        else:
            other = chance.choice(files)
            start = chance.randrange(len(other))
            data[at : at + chance.randint(0, 64)] = other[start : start + chance.randint(1, 64)]
    return fixed_png(bytes(data)) if chance.random() < 0.5 else bytes(data)


def fixed_png(data: bytes) -> bytes:
    """With the checksums of its chunks made right, so that what they hold is looked at."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    out, at = bytearray(data), 8
    while at + 12 <= len(out):
        (size,) = struct.unpack_from(">I", out, at)
        if at + 12 + size > len(out):
            break
        struct.pack_into(">I", out, at + 8 + size, zlib.crc32(out[at + 4 : at + 8 + size]))
        at += 12 + size
    return bytes(out)


def outcome(data: bytes) -> str:
    """Pixels or a MediaError with a short message, within the time; any other exception passes and fails."""
    start = time.process_time()
    try:
        got = prepare_image(MediaItem("image", data, "images[3]"), SMALL, MediaOptions(), b"")
        assert isinstance(got, PreparedMedia) and got.frames.dtype == np.uint8
        result = "pixels"
    except MediaError as error:
        assert str(error).startswith("images[3]: ") and len(str(error)) < 500
        result = "refused"
    assert time.process_time() - start < SECONDS
    return result


def test_seeds_are_read():
    assert all(outcome(data) == "pixels" for data in seeds())


@pytest.mark.parametrize("part", range(4))
def test_mutated_files(part):
    chance, files = random.Random(part), seeds()
    counts = {"pixels": 0, "refused": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(MUTATIONS // 4):
            counts[outcome(mutated(chance, files))] += 1
    assert min(counts.values()) > MUTATIONS // 40, counts  # both ways are gone


def test_warnings_as_errors_are_media_errors():
    """Whoever turns warnings into errors gets them as the errors of the medium."""
    chance, files = random.Random(9), seeds()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(300):
            outcome(mutated(chance, files))


# Bombs: (what the reason says, the file), each made small and read in a process of its own.


def png(width: int, height: int, rows: int = 0, color: int = 0) -> bytes:
    """`rows` rows of zeros of a grey (0) or RGBA (6) image, whatever the header says."""
    packer, body = zlib.compressobj(9), b""
    for _ in range(rows):
        body += packer.compress(bytes(1 + width * (4 if color == 6 else 1)))
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, color, 0, 0, 0)),
        (b"IDAT", body + packer.flush()),
    )
    out = b"\x89PNG\r\n\x1a\n"
    for name, data in (*chunks, (b"IEND", b"")):
        out += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    return out


def patched(data: bytes, at: int, value: bytes) -> bytes:
    return data[:at] + value + data[at + len(value) :]


def scans(count: int) -> bytes:
    """A progressive JPEG of 3000 x 3000 pixels whose last scan comes `count` times."""
    data = encoded(Image.new("RGB", (16, 16)), "JPEG", progressive=True)
    data = patched(data, data.index(b"\xff\xc2") + 5, struct.pack(">HH", 3000, 3000))
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * count + data[-2:]


def tiff(**tags: int) -> bytes:
    """A TIFF of 16 x 16 grey pixels by its tags, each a 32-bit number, then a kilobyte of deflated zeros."""
    names = {"width": 256, "height": 257, "bits": 258, "compression": 259, "photo": 262, "offsets": 273,
             "samples": 277, "rows": 278, "counts": 279, "tile_width": 322, "tile_length": 323,
             "tile_offsets": 324, "tile_counts": 325}  # fmt: skip
    body = zlib.compress(bytes(1 << 20), 9)
    base = {"width": 16, "height": 16, "bits": 8, "compression": 8, "photo": 1, "samples": 1}
    where = 8 + 2 + 12 * (len(base | tags) + (2 if "tile_width" in tags else 3)) + 4
    data = {"tile_offsets": where, "tile_counts": len(body)} if "tile_width" in tags else {
        "offsets": where, "rows": 16, "counts": len(body)}  # fmt: skip
    entries = sorted((names[name], value) for name, value in (base | data | tags).items())
    out = b"II*\0" + struct.pack("<IH", 8, len(entries))
    for tag, value in entries:
        out += struct.pack("<HHII", tag, 4, 1, value)
    return out.ljust(where, b"\0") + body


def bombs() -> dict[str, bytes]:
    black = Image.new("RGB", (16, 16))
    jpeg, gif = encoded(black, "JPEG"), encoded(black, "GIF")
    png_file = encoded(black, "PNG")
    bmp, webp = encoded(black, "BMP"), encoded(black, "WEBP")
    size = jpeg.index(b"\xff\xc0") + 5
    lossless = encoded(black, "WEBP", lossless=True)
    animated = encoded(
        Image.new("RGBA", (16, 16)), "WEBP", save_all=True, append_images=[Image.new("RGBA", (16, 16), "red")]
    )
    return {
        "png 60000 x 60000": png(60_000, 60_000, 4000),
        "png of all sides": png(0x7FFFFFFF, 0x7FFFFFFF, 0),
        "png that is long": png(65_536, 300, 300),
        "png of 4 GB, RGBA": png(40_000, 25_000, 500, 6),
        "png below the limit of pixels": png(5792, 5792, 5792, 6),
        "png with less than it says": png(5000, 5000, 10, 6),
        "jpeg 65500 x 65500": patched(jpeg, size, struct.pack(">HH", 65_500, 65_500)),
        "jpeg 5000 x 5000 of nothing": patched(jpeg, size, struct.pack(">HH", 5000, 5000)),
        "jpeg of 500 scans": scans(500),
        "jpeg of markers": jpeg[:2] + b"\xff\xfe\0\2" * 2_000_000 + jpeg[2:],
        "png of chunks": png_file[:33] + b"\0\0\0\0abCd\x78\x06\xe9\xb3" * 1_000_000 + png_file[33:],
        "gif of comments": gif[:13] + b"\x21\xfe\0" * 5_000_000 + gif[13:],
        "gif 65535 x 65535": patched(gif, 6, b"\xff" * 4),
        "gif with a large frame": patched(gif, gif.index(b"\x2c") + 5, b"\xff" * 4),
        "bmp 2^31": patched(bmp, 18, struct.pack("<ii", 0x7FFFFFFF, 0x7FFFFFFF)),
        "bmp upside down": patched(bmp, 18, struct.pack("<ii", 30_000, -30_000)),
        "bmp of runs": rle_bmp(5000, 5000, b"\xff\0" * 1000),
        "bmp of ends of lines": rle_bmp(1000, 1000, b"\1\1\0\0" * 500_000),
        "webp 16383 x 16383": patched(webp, 26, b"\xff\x3f\xff\x3f"),
        "webp lossless 16384 x 16384": patched(lossless, 21, b"\xff\xff\xff\x0f"),
        "webp canvas 2^24": patched(animated, 24, b"\xff" * 6),
        "tiff 2^31": tiff(width=0x7FFFFFFF, height=0x7FFFFFFF),
        "tiff of one long strip": tiff(width=100_000, height=100_000, rows=100_000),
        "tiff of a large tile": tiff(tile_width=1 << 15, tile_length=1 << 15),
        "tiff of a wide tile": tiff(tile_width=1 << 30, tile_length=16),
        "tiff of many samples": tiff(samples=65_535),
        "tiff of long rows": tiff(rows=0x7FFFFFFF),
        "ppm 10^9": b"P6 1000000000 1000000000 255\n",
        "ppm of digits": b"P3 " + b"9" * (1 << 20),
        "ppm as text": b"P2 3000 3000 9\n" + b"1 " * 1_000_000,
        "ppm of an odd range": b"P6 3000 3000 9\n" + bytes(1 << 20),
    }  # fmt: skip


READ_ALL = """
import os, pickle, resource, sys, time
from flexjudge_fast.errors import MediaError
from flexjudge_fast.media.image import prepare_image
from flexjudge_fast.media.items import MediaItem, MediaOptions
from flexjudge_fast.media.vision_processor import VisionProcessor

def read(data):
    try:
        prepare_image(MediaItem("image", data), VisionProcessor(), MediaOptions(), b"")
        return "pixels"
    except MediaError as error:
        return str(error)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10

read(b"P5 1 1 255\\n1")
for name, data in pickle.load(sys.stdin.buffer).items():
    child = os.fork()  # a peak of its own
    if child == 0:
        before, start = peak(), time.process_time()
        result = read(data)
        print(name, peak() - before, time.process_time() - start, result, sep="\\t", flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


def test_bombs():
    """Under 256 MB beyond what the process had; in less than 1 s, or 3 where pixels come of it."""
    files = bombs()
    command = [sys.executable, "-c", READ_ALL]
    done = subprocess.run(command, input=pickle.dumps(files), capture_output=True, check=True)
    found = [line.split("\t", 3) for line in done.stdout.decode().splitlines()]
    assert [name for name, *_ in found] == list(files)
    for name, memory, seconds, result in found:
        assert int(memory) < 256_000_000, (name, memory)
        assert float(seconds) < (3 if result == "pixels" else SECONDS), (name, seconds, result)
