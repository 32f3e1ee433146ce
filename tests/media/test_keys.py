"""Keys: media or settings that differ in anything never share one, equal ones always do."""

import itertools
import random
import subprocess
import sys
from dataclasses import dataclass, replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from flexjudge_fast.media.audio_processor import AudioProcessor
from flexjudge_fast.media.image import prepare_image
from flexjudge_fast.media.items import MediaItem, MediaOptions
from flexjudge_fast.media.keys import KEY_BYTES, PixelDigest, SampleDigest, audio_key, media_key, pixel_digest
from flexjudge_fast.media.vision_processor import VisionProcessor

PROCESSOR = VisionProcessor()
PROCESSORS = (
    PROCESSOR,
    replace(PROCESSOR, patch_size=7),
    replace(PROCESSOR, temporal_patch_size=1),
    replace(PROCESSOR, merge_size=1),
    replace(PROCESSOR, mean=(0.5, 0.5, 0.5)),
    replace(PROCESSOR, mean=PROCESSOR.mean[::-1]),
    replace(PROCESSOR, std=(0.5, 0.5, 0.5)),
    replace(PROCESSOR, mean=PROCESSOR.std, std=PROCESSOR.mean),
    replace(PROCESSOR, rescale_factor=1 / 256),
)


@dataclass(frozen=True)
class Medium:
    """Everything that a key stands for, comparable: `frames` are (dtype, shape, bytes)."""

    kind: str
    mode: str
    size: tuple[int, int]
    frames: tuple[tuple[str, tuple[int, ...], bytes], ...]
    target: tuple[int, int]
    processor: int
    salt: bytes
    frame_indices: tuple[int, ...]
    times: tuple[float, ...]
    fps: float

    def key(self) -> bytes:
        pixels = pixel_digest(
            [np.frombuffer(data, dtype).reshape(shape) for dtype, shape, data in self.frames]
        )
        return media_key(
            self.kind,
            mode=self.mode,
            size=self.size,
            pixels=pixels,
            target=self.target,
            processor=PROCESSORS[self.processor],
            salt=self.salt,
            frame_indices=self.frame_indices,
            times=self.times,
            fps=self.fps,
        )


_FRAME = ("|u1", (2, 2, 3), bytes(range(12)))
PLAIN = Medium("video", "RGB", (2, 2), (_FRAME,) * 2, (28, 28), 0, b"m", (0, 1), (0.0, 0.5), 2.0)


def random_frames(chance: random.Random) -> tuple[tuple[str, tuple[int, ...], bytes], ...]:
    """Few values, sizes and dtypes, so that frames are often the same bytes cut differently."""
    size = chance.choice([0, 2, 4, 12])
    data = bytes(chance.randrange(2) for _ in range(size)) if chance.random() < 0.5 else bytes(size)
    dtype, width = chance.choice([("|u1", 1), ("|i1", 1), ("<u2", 2), (">u2", 2)])
    count = size // width
    shape = chance.choice([(count,), (1, count), (count, 1), (count // 2, 2) if count % 2 == 0 else (count,)])
    if count > 1 and len(shape) == 1 and chance.random() < 0.3:
        at = count // 2
        return ((dtype, (at,), data[: at * width]), (dtype, (count - at,), data[at * width :]))
    return ((dtype, shape, data),) * chance.choice([0, 1, 1, 2])


CHOICES = {
    "kind": ("image", "video"),
    "mode": ("RGB", "RGBA", "P", "L", "", "R", "GB"),
    "size": ((2, 3), (3, 2), (23, 2), (2, 32)),
    "target": ((28, 56), (56, 28), (28, 28)),
    "processor": tuple(range(len(PROCESSORS))),
    "salt": (b"", b"R", b"RGB", b"float32", b"bfloat16"),
    "frame_indices": ((), (0,), (1,), (0, 1), (1, 0)),
    "times": ((), (0.0,), (-0.0,), (1.0,), (0.0, 1.0), (5e-324,)),
    "fps": (0.0, 1.0, 2.0, float(np.nextafter(2.0, 3.0))),
}


def exact(medium: Medium) -> str:
    """Tells 0.0 from -0.0, which compare equal."""
    return repr(medium)


def test_a_hundred_thousand_pairs():
    """A walk that changes one field at each step: neighbours differ in it alone, and no two media anywhere on
    the walk share a key unless they are equal."""
    chance = random.Random(0)
    fields = [*CHOICES, "frames", "frames"]
    medium = replace(PLAIN)
    seen = {medium.key(): exact(medium)}
    pairs = 0
    while pairs < 100_000:
        name = chance.choice(fields)
        value = random_frames(chance) if name == "frames" else chance.choice(CHOICES[name])
        changed = replace(medium, **{name: value})
        if exact(changed) == exact(medium):
            continue
        pairs += 1
        medium = changed
        assert seen.setdefault(medium.key(), exact(medium)) == exact(medium)
    # `seen` has one entry a key: as many as there were distinct media, or equal media had two keys.
    assert len(seen) == len(set(seen.values())) > 50_000
    assert all(len(key) == KEY_BYTES for key in seen)


def test_adversarial_pairs():
    """The same bytes, read otherwise."""
    whole = ("|u1", (2, 2, 3), bytes(range(12)))
    variants = [
        PLAIN,
        replace(PLAIN, kind="image"),
        replace(PLAIN, mode="RG", salt=b"Bm"),
        replace(PLAIN, mode="", salt=b"RGBm"),
        replace(PLAIN, mode="BGR"),
        replace(PLAIN, size=(1, 4)),
        replace(PLAIN, size=(28, 28), target=(2, 2)),
        replace(PLAIN, frames=(whole,)),
        replace(PLAIN, frames=(("|u1", (2, 2, 2, 3), whole[2] * 2),)),
        replace(PLAIN, frames=(("|u1", (4, 2, 3), whole[2] * 2),)),
        replace(PLAIN, frames=(("|u1", (2, 4, 3), whole[2] * 2),)),
        replace(PLAIN, frames=(whole, whole, ("|u1", (0, 2, 3), b""))),
        replace(PLAIN, frames=(("|u1", (2, 2, 3), whole[2]), ("|i1", (2, 2, 3), whole[2]))),
        replace(PLAIN, frame_indices=(0, 1, 0), times=(0.5,)),
        replace(PLAIN, frame_indices=(1, 0)),
        replace(PLAIN, times=(0.0, 0.5, 2.0)),
        replace(PLAIN, times=(0.0,), fps=0.5),
        replace(PLAIN, times=(-0.0, 0.5)),
        replace(PLAIN, fps=25.0),
        replace(PLAIN, salt=b""),
        replace(PLAIN, salt=b"M"),
        *(replace(PLAIN, processor=i) for i in range(1, len(PROCESSORS))),
    ]
    for one, other in itertools.combinations(variants, 2):
        assert one.key() != other.key(), (one, other)


@given(st.lists(st.binary(max_size=6), max_size=4), st.lists(st.binary(max_size=6), max_size=4))
@settings(max_examples=300, deadline=None)
def test_frames_are_told_apart_however_they_are_cut(one, other):
    digests = [pixel_digest([np.frombuffer(frame, np.uint8) for frame in frames]) for frames in (one, other)]
    assert (digests[0] == digests[1]) == (one == other)


def test_digest_grows_with_its_frames():
    """One at a time or all at once, read in between or not, whatever the strides."""
    frames = list(np.random.default_rng(1).integers(0, 256, (3, 5, 4, 3), dtype=np.uint8))
    digest = PixelDigest()
    for i, frame in enumerate(frames):
        assert digest.digest() == pixel_digest(frames[:i])
        digest.update(np.asfortranarray(frame))
    assert digest.digest() == pixel_digest(frames)


def key_of(source: object, **options) -> bytes:
    return prepare_image(MediaItem("image", source), PROCESSOR, MediaOptions(**options), b"").key


def test_images_of_the_same_bytes():
    """One buffer as other mode, size, palette, transparency; and the same picture from elsewhere."""
    data = bytes(np.random.default_rng(2).integers(0, 256, 12 * 20 * 4, dtype=np.uint8))
    images = [
        Image.frombytes(mode, size, data[: size[0] * size[1] * len(mode)])
        for mode in ("L", "RGB", "RGBA", "CMYK")
        for size in ((12, 20), (20, 12), (24, 10))
    ]
    for palette in (bytes(range(256)) * 3, bytes(range(255, -1, -1)) * 3):
        image = Image.frombytes("P", (12, 20), data[:240])
        image.putpalette(palette)
        images.append(image)
        clear = image.copy()
        clear.info["transparency"] = data[0]
        images.append(clear)
    keys = {key_of(image) for image in images}
    assert len(keys) == len(images)
    rgb = next(image for image in images if image.mode == "RGB")
    assert key_of(rgb) == key_of(np.asarray(rgb)) == key_of(rgb.copy())
    assert len({key_of(rgb, **options) for options in ({}, {"max_pixels": 784}, {"resize": (112, 84)})}) == 3


AUDIO_PROCESSORS = (
    AudioProcessor(),
    AudioProcessor(feature_size=80),
    AudioProcessor(hop_length=400, n_fft=160),
    AudioProcessor(n_fft=512),
    AudioProcessor(chunk_length=30),
)


def test_thirty_thousand_pairs_of_sounds():
    """As for pixels: a walk that changes one field at each step, often to the same bytes cut otherwise."""
    chance = random.Random(4)
    choices = {
        "samples": [bytes(4 * chance.randrange(2) for _ in range(n)) for n in (0, 16, 16, 32, 32) * 40],
        "channels": (1, 2, 4),
        "rate": (8000, 16_000, 44_100, 48_000),
        "salt": (b"", b"a", b"c", b"float32"),
        "processor": tuple(range(len(AUDIO_PROCESSORS))),
    }
    sound = {name: values[0] for name, values in choices.items()}
    seen: dict[bytes, str] = {}
    pairs = 0
    while pairs < 30_000:
        name = chance.choice(list(choices))
        changed = {**sound, name: chance.choice(choices[name])}
        if changed == sound:
            continue
        pairs += 1
        sound = changed
        assert seen.setdefault(key_of_sound(**sound), repr(sound)) == repr(sound)
    assert len(seen) == len(set(seen.values())) > 15_000


def key_of_sound(samples: bytes, channels: int, rate: int, salt: bytes, processor: int) -> bytes:
    digest = SampleDigest(channels)
    digest.update(np.frombuffer(samples, "<f4").reshape(-1, channels))
    settings = AUDIO_PROCESSORS[processor]
    return audio_key(samples=digest.digest(), rate=rate, processor=settings, salt=salt)


def test_without_torch():
    """The video worker reads keys and processor without loading torch."""
    code = "import flexjudge_fast.media.keys, sys; assert not {'torch', 'PIL'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
