"""5,000 mutated sounds: each is read or refused with a MediaError within a second, in bounded memory."""

import random
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from flexjudge_fast.errors import MediaError
from flexjudge_fast.media.audio import prepare_audio
from flexjudge_fast.media.audio_limits import AudioLimits
from flexjudge_fast.media.audio_pool import AudioDecoder
from flexjudge_fast.media.audio_processor import AudioProcessor
from flexjudge_fast.media.items import MediaItem
from flexjudge_fast.media.worker_pool import DecodingProcess
from tests.media.sounds import FORMATS, make_sound, tones

PROCESSOR = AudioProcessor()
NUM_SOUNDS = 5000
MAX_MEMORY = 256e6
LIES = [0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x4000, 0x7FFFFFFF, 0xFFFFFFFF, 0x80000000, 0x10000, 0x01000000]
NAMES = b"RIFF fmt data fact FORM COMM SSND fLaC OggS vorbis OpusHead Xing Info LAME ftyp moov mdhd".split()
NAMES += b"stsd mp4a esds stts stsz stsc stco elst".split()

Mutation = Callable[[random.Random, bytearray, list[bytes]], None]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Spectrograms of a fraction of a second would only wait for further threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def flip_bits(rng: random.Random, data: bytearray, others: list[bytes]) -> None:
    reach = rng.choice([len(data), min(len(data), 200)])
    for _ in range(rng.choice([1, 2, 4, 16, 64])):
        data[rng.randrange(reach)] ^= 1 << rng.randrange(8)


def truncate(rng: random.Random, data: bytearray, others: list[bytes]) -> None:
    del data[rng.randrange(len(data)) :]


def splice(rng: random.Random, data: bytearray, others: list[bytes]) -> None:
    other = rng.choice(others)
    start, at = rng.randrange(len(other)), rng.randrange(len(data))
    data[at : at + rng.choice([0, 50, 500])] = other[start : start + rng.randrange(1, 2000)]


def repeat(rng: random.Random, data: bytearray, others: list[bytes]) -> None:
    start = rng.randrange(len(data))
    data[start:start] = data[start : start + rng.randrange(1, 3000)] * rng.randrange(1, 8)


def blank(rng: random.Random, data: bytearray, others: list[bytes]) -> None:
    start = rng.randrange(len(data))
    size = min(rng.randrange(1, 300), len(data) - start)
    data[start : start + size] = bytes([rng.choice([0, 255])]) * size


def lie(rng: random.Random, data: bytearray, others: list[bytes]) -> None:
    """A number that is far too large or too small, in either byte order, anywhere or after a chunk's name."""
    names = [name for name in NAMES if name in data]
    at = rng.randrange(len(data))
    if names and rng.random() < 0.8:
        at = data.index(rng.choice(names)) + rng.randrange(-4, 48)
    kind = rng.choice(["<I", ">I", "<H", ">H"])
    at = max(0, min(at, len(data) - struct.calcsize(kind)))
    struct.pack_into(kind, data, at, rng.choice(LIES) & (0xFFFF if kind[1] == "H" else 0xFFFFFFFF))


MUTATIONS: list[Mutation] = [flip_bits, flip_bits, truncate, splice, repeat, blank, lie, lie]


def mutated(count: int, seed: int) -> list[bytes]:
    rng = random.Random(seed)
    shapes = ((2000, 16_000, 1), (3000, 24_000, 2))
    seeds = [make_sound(name, tones(n, rate, c), rate) for name in FORMATS for n, rate, c in shapes]
    sounds = []
    for i in range(count):
        data = bytearray(seeds[i % len(seeds)])
        for _ in range(rng.choice([1, 1, 2, 3])):
            if len(data) > 8:
                rng.choice(MUTATIONS)(rng, data, seeds)
        sounds.append(bytes(data))
    return sounds


def outcome(decoder: AudioDecoder, data: bytes) -> tuple[str, float]:
    """What became of a sound, and the seconds until then; anything but a MediaError is raised."""
    start = time.perf_counter()
    try:
        audio = prepare_audio(MediaItem("audio", data), PROCESSOR, b"", decoder)
    except MediaError as error:
        return str(error), time.perf_counter() - start
    assert np.isfinite(audio.features).all() and audio.num_tokens > 0
    return "read", time.perf_counter() - start


def settled(decoder: AudioDecoder, data: bytes) -> tuple[str, float]:
    """As `outcome`, once more where it took long: a busy machine is not slow twice; a hang is."""
    what, seconds = outcome(decoder, data)
    return (what, seconds) if seconds < 1 else outcome(decoder, data)


@pytest.fixture
def peaks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes that each process held at most, once it has ended."""
    found: list[int] = []
    kill = DecodingProcess.kill

    def measured(self: DecodingProcess) -> None:
        status = Path(f"/proc/{self.process.pid}/status")
        if status.exists() and "VmHWM:" in (text := status.read_text()):
            found.append(int(text.split("VmHWM:")[1].split()[0]) * 1024)
        kill(self)

    monkeypatch.setattr(DecodingProcess, "kill", measured)
    return found


def test_mutated_sounds(peaks: list[int]) -> None:
    sounds = mutated(NUM_SOUNDS, seed=17)
    with AudioDecoder() as decoder:
        outcomes = [settled(decoder, data) for data in sounds]
    assert max(seconds for _, seconds in outcomes) < 1
    assert max(peaks) < MAX_MEMORY
    num_read = sum(what == "read" for what, _ in outcomes)
    assert 500 < num_read < NUM_SOUNDS - 500  # the mutations are neither too weak nor too strong


MATROSKA = bytes.fromhex("1a45dfa39f4286810142f7810142f2810442f381084282847765626d4287810242858102")
JUNK = {  # how a large file begins, and what it repeats
    "ogg": (b"OggS\0\0", b"OggS"),
    "ogg behind sound": (make_sound("ogg", tones(2000, 16_000), 16_000), b"OggS"),
    "wav": (b"RIFF\xff\xff\xff\xffWAVE", b"junk\0\0\0\0"),
    "mp4": (b"\0\0\0\x14ftypisom\0\0\0\0isom", b"\0\0\0\x08free"),
    "avi": (b"RIFF\xff\xff\xff\xffAVI ", b"LIST\x04\0\0\0abcd"),
    "aiff": (b"FORM\x7f\xff\xff\xffAIFF", b"ANNO\0\0\0\0"),
    "adts": (b"", b"\xff\xf1\x50\x80\x01\x1f\xfc\x00"),
    "matroska": (MATROSKA + b"\x18\x53\x80\x67\x01" + b"\xff" * 7, b"\xec\x80"),
}


@pytest.mark.parametrize("shape", JUNK)
def test_much_of_nothing(peaks: list[int], shape: str) -> None:
    """Files that a demuxer searches to their end, which takes it up to 25 s at the limit of 64 MiB."""
    head, piece = JUNK[shape]
    data = head + piece * ((48 << 20) // len(piece))
    with AudioDecoder(AudioLimits(patience=0.25)) as decoder:
        outcome(decoder, b"none")  # the process starts
        what, seconds = settled(decoder, data)
        assert outcome(decoder, make_sound("ogg", tones(2000, 16_000), 16_000))[0] == "read"
    assert what.endswith("the process that decodes it found nothing more in it for too long")
    assert seconds < 1
    assert max(peaks) < MAX_MEMORY
    assert AudioLimits().patience < 0.8


def test_patience_with_what_goes_on() -> None:
    """A long sound takes more processor time than may pass without samples."""
    data = make_sound("flac", tones(150 * 48_000, 48_000, 2), 48_000)
    with AudioDecoder(AudioLimits(patience=0.1)) as decoder:
        assert outcome(decoder, data)[0] == "read"


def ogg_pages(first: bytes, num_pages: int, granule_step: int) -> bytes:
    """The two pages of an Opus header, then pages of 255 packets of 120 ms of silence, two bytes each."""
    packets = b"\x1b\x02" * 255  # narrow band, 60 ms, code 3: two frames that are empty
    page = b"OggS" + bytes(22) + b"\xff" + b"\x02" * 255 + packets
    pages = np.tile(np.frombuffer(page, np.uint8), (num_pages, 1))
    numbers = np.arange(1, num_pages + 1)
    pages[:, 6:14] = (numbers * granule_step).astype("<u8").view(np.uint8).reshape(-1, 8)
    pages[:, 14:18] = np.frombuffer(first[14:18], np.uint8)  # the stream's number
    pages[:, 18:22] = (numbers + 1).astype("<u4").view(np.uint8).reshape(-1, 4)
    pages[:, 22:26] = checksums(pages).astype("<u4").view(np.uint8).reshape(-1, 4)
    return first + pages.tobytes()


def checksums(pages: np.ndarray) -> np.ndarray:
    """uint32 [num_pages]: Ogg's CRC of each."""
    table = np.arange(256, dtype=np.uint32) << 24
    for _ in range(8):
        table = np.where(table >> 31, (table << 1) ^ np.uint32(0x04C11DB7), table << 1).astype(np.uint32)
    crc = np.zeros(len(pages), np.uint32)
    for column in pages.T:
        crc = (crc << 8) ^ table[(crc >> 24) ^ column]
    return crc


def opus_header() -> bytes:
    data = make_sound("opus", tones(4800, 48_000), 48_000)
    return data[: data.index(b"OggS", data.index(b"OpusTags"))]


@pytest.mark.parametrize("granule_step", [255 * 5760, 1])
def test_an_opus_bomb(peaks: list[int], granule_step: int) -> None:
    """25 MB that are eleven days of silence, whose header says so, or says a second."""
    data = ogg_pages(opus_header(), 31_000, granule_step)
    assert 24e6 < len(data) < 26e6
    with AudioDecoder() as decoder:
        outcome(decoder, b"none")  # the process starts
        what, seconds = outcome(decoder, data)
    assert "longer than the 300 s allowed" in what
    assert seconds < (1 if granule_step > 1 else 5)  # 300 s are decoded before a lie is found out
    assert max(peaks) < MAX_MEMORY


@pytest.mark.parametrize("total", [None, 0, 8000])
def test_a_flac_bomb(peaks: list[int], total: int | None) -> None:
    """An hour of silence in a few kilobytes, whose header says so, says nothing or a second."""
    data = bytearray(make_sound("flac", np.zeros((3600 * 8000, 1), np.int16), 8000))
    if total is not None:
        data[18:26] = (int.from_bytes(data[18:26], "big") & ~(2**36 - 1) | total).to_bytes(8, "big")
    with AudioDecoder() as decoder:
        outcome(decoder, b"none")  # the process starts
        what, seconds = outcome(decoder, bytes(data))
    assert "longer than the 300 s allowed" in what or total == 8000
    assert seconds < 1
    assert max(peaks) < MAX_MEMORY
