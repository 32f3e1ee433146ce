"""Images: every source and mode, orientation, limits, errors; pixel values are those of transformers."""

import base64
import io
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from flexjudge_fast.errors import InvalidArgumentError, MediaError
from flexjudge_fast.media.image import load_image, prepare_image
from flexjudge_fast.media.image_file import DEFAULT_LIMITS, ImageLimits
from flexjudge_fast.media.items import MediaItem, MediaOptions
from flexjudge_fast.media.vision_processor import VisionProcessor
from flexjudge_fast.ops.image import patchify

PROCESSOR, OPTIONS = VisionProcessor(), MediaOptions()
RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (30, 40, 3), dtype=np.uint8)
RGBA = RNG.integers(0, 256, (30, 40, 4), dtype=np.uint8)
GREY = RGB[..., 0].copy()


def encoded(image: Image.Image, name: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, name, **options)
    return out.getvalue()


PNG = encoded(Image.fromarray(RGB), "PNG")


def load(source: object, limits: ImageLimits = DEFAULT_LIMITS, allow_remote: bool = False):
    return load_image(MediaItem("image", source, "images[0]"), limits, allow_remote)[0]


def refusal(source: object, limits: ImageLimits = DEFAULT_LIMITS) -> str:
    with pytest.raises(MediaError) as caught:
        load(source, limits)
    message = str(caught.value)
    assert message.startswith("images[0]: ") and len(message) < 500
    return message


def over_white(rgba: np.ndarray) -> np.ndarray:
    """Exact, in float64."""
    alpha = rgba[..., 3:] / 255
    return np.floor(rgba[..., :3] * alpha + 255 * (1 - alpha) + 0.5).astype(np.uint8)


# Sources


def test_every_source_gives_the_same(tmp_path):
    path = tmp_path / "bild ä.png"
    path.write_bytes(PNG)
    url = "data:image/png;base64," + base64.b64encode(PNG).decode()
    for source in (str(path), path, PNG, bytearray(PNG), memoryview(PNG), url, Image.fromarray(RGB), RGB):
        assert np.array_equal(load(source), RGB)
    keys = {
        prepare_image(MediaItem("image", source), PROCESSOR, OPTIONS, b"").key
        for source in (path, PNG, url, Image.fromarray(RGB), RGB)
    }
    assert len(keys) == 1


@pytest.mark.parametrize(("name", "options"), [
    ("PNG", {}), ("BMP", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("PPM", {}),
    ("WEBP", {"lossless": True}),
])  # fmt: skip
def test_lossless_formats(name, options):
    assert np.array_equal(load(encoded(Image.fromarray(RGB), name, **options)), RGB)


@pytest.mark.parametrize("name", ["JPEG", "GIF", "WEBP"])
def test_other_formats_are_pillow(name):
    data = encoded(Image.fromarray(RGB), name)
    assert np.array_equal(load(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_arrays():
    assert np.array_equal(load(GREY), np.stack([GREY] * 3, -1))
    assert np.array_equal(load(GREY[..., None]), np.stack([GREY] * 3, -1))
    assert np.array_equal(load(RGBA), over_white(RGBA))
    assert np.array_equal(load(RGB[::2, ::-3]), RGB[::2, ::-3])
    fixed = RGB.copy()
    fixed.setflags(write=False)
    got = load(fixed)
    got[:] = 0  # ours: nothing of the caller's changes
    assert np.array_equal(fixed, RGB)
    for wrong in (RGB.astype(np.float32), RGB.astype(np.int8), RGB[None], RGB[..., :2], RGB[0, 0], RGB[:0]):
        assert "ndarray" in refusal(wrong)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (3, "not a path"),
        (None, "not a path"),
        ([1, 2], "not a path"),
        ("", "No such file"),
        ("no/such/file.png", "No such file"),
        ("a\0b", "null"),
        ("x" * 100_000, "File name too long"),
        ("/", "directory|not a regular"),
        ("/dev/zero", "not a regular file"),
        ("file:///etc/passwd", "file: URLs"),
        ("http://127.0.0.1/a.png", "allow_remote"),
        ("HTTPS://user:secret@host/a.png?token=1", "allow_remote"),
        ("data:image/png,abc", "base64"),
        ("data:image/png;base64,a b", "base64"),
        ("data:image/png;base64,", "empty"),
        (b"", "empty"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "none of JPEG"),
        (b"<svg/>", "none of JPEG"),
        (PNG[:-30], "decoded"),
    ],
    ids=range(19),
)
def test_what_cannot_be_read(source, reason):
    message = refusal(source)
    assert re.search(reason, message), message
    assert "secret" not in message and "token" not in message


def test_a_pipe_does_not_wait(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in refusal(tmp_path / "pipe")


@pytest.fixture
def server():
    """Serves PNG at /a.png, redirects /file to a file: URL, sends without end at /long."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response({"/file": 302, "/none": 404}.get(self.path, 200))
            if self.path == "/file":
                self.send_header("Location", "file:///etc/hostname")
            self.end_headers()
            try:
                if self.path == "/a.png":
                    self.wfile.write(PNG)
                while self.path == "/long":
                    self.wfile.write(b"x" * 65536)
            except OSError:
                pass

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as found:
        thread = threading.Thread(target=found.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{found.server_port}"
        found.shutdown()


def test_remote(server, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert np.array_equal(load(f"{server}/a.png", allow_remote=True), RGB)
    for path, reason in (("/file", "fetched"), ("/none", "404"), ("/long", "more than")):
        with pytest.raises(MediaError, match=reason):
            load(server + path, ImageLimits(file_bytes=1 << 20), allow_remote=True)
    with pytest.raises(MediaError, match="fetched"):
        load("http://127.0.0.1:1/a.png", allow_remote=True)


# Modes


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV", "RGBX"])
def test_opaque_modes_are_pillows_rgb(mode):
    image = Image.fromarray(RGB).convert(mode)
    assert np.array_equal(load(image), np.asarray(image.convert("RGB")))


def test_alpha_is_laid_over_white():
    rgba = Image.fromarray(RGBA)
    for source in (
        rgba,
        encoded(rgba, "PNG"),
        encoded(rgba, "TIFF"),
        encoded(rgba, "WEBP", lossless=True, exact=True),
    ):
        assert np.array_equal(load(source), over_white(RGBA))
    grey = rgba.convert("LA")
    assert np.array_equal(load(encoded(grey, "PNG")), over_white(np.asarray(grey.convert("RGBA"))))
    palette = Image.fromarray(RGB).quantize(16)
    palette.info["transparency"] = bytes(range(0, 256, 16))
    data = encoded(palette, "PNG")
    want = over_white(np.asarray(Image.open(io.BytesIO(data)).convert("RGBA")))
    assert np.array_equal(load(data), want)
    clear = encoded(Image.fromarray(RGB), "PNG", transparency=tuple(map(int, RGB[3, 4])))
    assert list(load(clear)[3, 4]) == [255, 255, 255] and np.array_equal(load(clear)[0], RGB[0])


def test_sixteen_bits():
    values = RNG.integers(0, 65536, (30, 40), dtype=np.uint16)
    want = np.repeat(np.rint(values / 257).astype(np.uint8)[..., None], 3, -1)
    image = Image.fromarray(values)
    for source in (
        image,
        encoded(image, "PNG"),
        encoded(image, "TIFF"),
        Image.fromarray(values.astype(np.int32)),
    ):
        assert np.array_equal(load(source), want)
    ppm = b"P5 40 30 65535\n" + values.astype(">u2").tobytes()
    assert np.array_equal(load(ppm), want)
    assert "65,535" in refusal(Image.fromarray(values.astype(np.int32) + 65536))
    assert "mode F" in refusal(Image.fromarray(values.astype(np.float32)))
    assert "mode LAB" in refusal(Image.new("LAB", (4, 4)))


@pytest.mark.parametrize("name", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame(name):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    data = encoded(frames[0], name, save_all=True, append_images=frames[1:])
    assert np.array_equal(load(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    assert load(data)[0, 0, 0] > 250 and load(data)[0, 0, 2] < 5


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(10))
def test_orientation(name, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(RGB), name, exif=exif)
    want = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    assert np.array_equal(load(data), want)
    assert np.array_equal(load(Image.open(io.BytesIO(data))), want)


def test_broken_exif_is_no_exif():
    data = encoded(Image.fromarray(RGB), "PNG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff" * 3)
    assert np.array_equal(load(data), RGB)


# Limits


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        (ImageLimits(file_bytes=100), "bytes are more than the 100"),
        (ImageLimits(side=39), "longer than 39"),
        (ImageLimits(pixels=1199), "more than the 1,199"),
        (ImageLimits(aspect_ratio=1), "aspect ratio"),
        (ImageLimits(memory_bytes=9000), "memory|decoding takes"),
    ],
)
def test_limits(limits, reason, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(PNG)
    for source in (PNG, path, "data:image/png;base64," + base64.b64encode(PNG).decode()):
        with pytest.raises(MediaError, match=reason):
            load(source, limits)


# What the encoder gets


def test_pixel_values_are_transformers():
    """To the last bit, RGB and grey, 40 sizes from a pixel to beyond max_pixels."""
    chance = np.random.default_rng(5)
    theirs = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=300_000)
    ours = VisionProcessor(max_pixels=300_000)
    table = torch.from_numpy(ours.normalization_table())
    sizes = [(1, 1), (1, 199), (200, 1), (27, 29), (448, 448), (700, 900), *chance.integers(8, 500, (34, 2))]
    for i, (height, width) in enumerate(sizes):
        pixels = chance.integers(0, 256, (height, width, 3), dtype=np.uint8)
        image = Image.fromarray(pixels if i % 3 else pixels[..., 0])
        want = theirs(images=[image], return_tensors="np")
        got = prepare_image(MediaItem("image", encoded(image, "PNG")), ours, OPTIONS, b"")
        values = patchify(torch.from_numpy(got.frames), table, 14, 2, 2)
        assert got.grid == tuple(want["image_grid_thw"][0]) and got.num_tokens == len(values) // 4
        assert np.array_equal(values.numpy(), want["pixel_values"]), (height, width)


def test_options():
    item = MediaItem("image", RGB)
    small = prepare_image(item, PROCESSOR, MediaOptions(resize=(280, 112)), b"")
    assert small.frames.shape == (1, 112, 280, 3) and small.grid == (1, 8, 20) and small.num_tokens == 40
    least = prepare_image(item, PROCESSOR, MediaOptions(max_pixels=28 * 28), b"")
    assert least.frames.shape == (1, 28, 28, 3)
    keys = {prepare_image(item, PROCESSOR, options, salt).key
            for options in (OPTIONS, MediaOptions(resize=(280, 112)), MediaOptions(max_pixels=784))
            for salt in (b"", b"a")}  # fmt: skip
    assert len(keys) == 6
    for wrong in (MediaOptions(resize=(0, 3)), MediaOptions(resize=(3, 1 << 40)), MediaOptions(max_pixels=0)):
        with pytest.raises(InvalidArgumentError):
            prepare_image(item, PROCESSOR, wrong, b"")
    with pytest.raises(MediaError, match=r"images\[1\]: ndarray: .*200 times"):
        prepare_image(MediaItem("image", RGB, "images[1]"), PROCESSOR, MediaOptions(resize=(1000, 2)), b"")


def test_threads(tmp_path):
    """Eight at a time, all formats, the same results."""
    sources = []
    for i, name in enumerate(["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM"] * 4):
        path = Path(tmp_path / f"{i}.{name}")
        path.write_bytes(encoded(Image.fromarray(np.roll(RGB, i, 0)), name))
        sources.append(path)
    want = [prepare_image(MediaItem("image", path), PROCESSOR, OPTIONS, b"").key for path in sources]
    with ThreadPoolExecutor(8) as pool:
        got = pool.map(
            lambda path: prepare_image(MediaItem("image", path), PROCESSOR, OPTIONS, b"").key, sources
        )
        assert list(got) == want
