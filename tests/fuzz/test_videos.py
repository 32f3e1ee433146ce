"""2,000 mutated videos: each is decoded or refused with a MediaError within a second, in bounded memory."""

import random
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from flexjudge_fast.errors import MediaError
from flexjudge_fast.media.video_limits import VideoLimits
from flexjudge_fast.media.video_pool import VideoDecoder
from flexjudge_fast.media.video_sampling import FrameBudget
from flexjudge_fast.media.worker_pool import DecodingProcess
from tests.media.videos import FORMATS, make_video

BUDGET = FrameBudget(min_pixels=4 * 28 * 28, max_pixels=16 * 28 * 28, max_frames=8)
NUM_VIDEOS = 2000
MAX_MEMORY = 256e6
LIES = [0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x4000, 0x7FFFFFFF, 0xFFFFFFFF, 0x80000000, 0x10000, 0x01000000]
ATOMS = b"moov trak stsd stts stsz stsc stco tkhd mdhd avc1 avcC mp4v elst ctts stss esds dref".split()
ATOMS += b"strh strf avih idx1 RIFF movi".split()
PLAYLISTS = [
    b"#EXTM3U\n#EXTINF:1,\n/etc/passwd\n",
    b"#EXTM3U\n#EXT-X-MEDIA-SEQUENCE:0\n#EXTINF:10,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
    b"ffconcat version 1.0\nfile '/etc/passwd'\nduration 1\n",
    b"ffconcat version 1.0\nfile 'http://127.0.0.1:1/x'\n",
    b"[playlist]\nFile1=/etc/passwd\n",
    b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nm=video 5004 RTP/AVP 96\n",
    b"<MPD><Period><AdaptationSet><BaseURL>/etc/passwd</BaseURL></AdaptationSet></Period></MPD>",
    b"rtsptext file:///etc/passwd\n",
    b"/etc/passwd",
    b"file:/etc/passwd",
    b"subfile,,start,0,end,9,,:/etc/passwd",
    b"concat:/etc/passwd|/etc/hosts",
]

Mutation = Callable[[random.Random, bytearray, list[bytes]], None]


def flip_bits(rng: random.Random, data: bytearray, others: list[bytes]) -> None:
    for _ in range(rng.choice([1, 2, 4, 16, 64])):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def flip_header_bits(rng: random.Random, data: bytearray, others: list[bytes]) -> None:
    for _ in range(rng.choice([1, 2, 4, 8])):
        data[rng.randrange(min(len(data), 400))] ^= 1 << rng.randrange(8)


def truncate(rng: random.Random, data: bytearray, others: list[bytes]) -> None:
    del data[rng.randrange(len(data)) :]


def splice(rng: random.Random, data: bytearray, others: list[bytes]) -> None:
    other = rng.choice(others)
    start = rng.randrange(len(other))
    at = rng.randrange(len(data))
    data[at : at + rng.choice([0, 50, 500])] = other[start : start + rng.randrange(1, 2000)]


def repeat(rng: random.Random, data: bytearray, others: list[bytes]) -> None:
    start = rng.randrange(len(data))
    piece = data[start : start + rng.randrange(1, 3000)]
    data[start:start] = piece * rng.randrange(1, 8)


def blank(rng: random.Random, data: bytearray, others: list[bytes]) -> None:
    start = rng.randrange(len(data))
    size = min(rng.randrange(1, 300), len(data) - start)
    data[start : start + size] = bytes([rng.choice([0, 255])]) * size


def lie(rng: random.Random, data: bytearray, others: list[bytes]) -> None:
    """A number that is far too large or too small, in either byte order, anywhere or after an atom's name."""
    for _ in range(rng.choice([1, 1, 2, 3])):
        names = [name for name in ATOMS if name in data]
        at = rng.randrange(len(data))
        if names and rng.random() < 0.8:
            at = data.index(rng.choice(names)) - 4 + rng.choice([0, *range(4, 60)])
        kind = rng.choice(["<I", ">I", "<H", ">H"])
        value = rng.choice(LIES) & (0xFFFF if kind[1] == "H" else 0xFFFFFFFF)
        at = max(0, min(at, len(data) - struct.calcsize(kind)))
        struct.pack_into(kind, data, at, value)


def become_a_playlist(rng: random.Random, data: bytearray, others: list[bytes]) -> None:
    text = rng.choice(PLAYLISTS)
    data[:] = text if rng.random() < 0.5 else text + bytes(data)


MUTATIONS: list[Mutation] = [flip_bits, flip_header_bits, truncate, splice, repeat, blank, lie, lie]
MUTATIONS.append(become_a_playlist)


def mutated(count: int, seed: int) -> list[bytes]:
    rng = random.Random(seed)
    seeds = [make_video(name, frames, (64, 48)) for name in FORMATS for frames in (4, 9)]
    seeds.append(endless())
    videos = []
    for i in range(count):
        data = bytearray(seeds[i % len(seeds)])
        for _ in range(rng.choice([1, 1, 2, 3])):
            if len(data) > 8:
                rng.choice(MUTATIONS)(rng, data, seeds)
        videos.append(bytes(data))
    return videos


def endless() -> bytes:
    """An MP4 of one frame whose tables name that frame two billion times."""
    data = bytearray(make_video("mp4-mpeg4", 1, (64, 48)))
    stsz = data.index(b"stsz")
    size = data[stsz + 8 : stsz + 12]
    if size == bytes(4):
        size = data[stsz + 16 : stsz + 20]
    data[stsz + 8 : stsz + 16] = size + struct.pack(">I", 0x7FFFFFFF)
    stts = data.index(b"stts")
    struct.pack_into(">I", data, stts + 12, 0x7FFFFFFF)
    stsc = data.index(b"stsc")
    struct.pack_into(">I", data, stsc + 16, 0x7FFFFFFF)
    return bytes(data)


def outcome(decoder: VideoDecoder, data: bytes) -> tuple[str, float]:
    """What became of a video, and the seconds until then; anything but a MediaError is raised."""
    start = time.perf_counter()
    try:
        decoder.decode(data, BUDGET)
        return "decoded", time.perf_counter() - start
    except MediaError as error:
        return str(error), time.perf_counter() - start


def test_mutated_videos(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = []
    kill = DecodingProcess.kill

    def measured(self: DecodingProcess) -> None:
        status = Path(f"/proc/{self.process.pid}/status")
        if status.exists() and "VmHWM:" in (text := status.read_text()):
            peaks.append(int(text.split("VmHWM:")[1].split()[0]) * 1024)
        kill(self)

    monkeypatch.setattr(DecodingProcess, "kill", measured)
    videos = mutated(NUM_VIDEOS, seed=11)
    intact = make_video()
    with VideoDecoder() as decoder:
        expected = decoder.decode(intact, BUDGET)
        outcomes = [outcome(decoder, data) for data in videos]
        for i, (_, seconds) in enumerate(outcomes):
            if seconds >= 1:  # a busy machine is not slow twice; a hang is
                outcomes[i] = outcome(decoder, videos[i])
        assert decoder.decode(intact, BUDGET).digest == expected.digest
    assert max(seconds for _, seconds in outcomes) < 1
    assert max(peaks) < MAX_MEMORY
    num_decoded = sum(what == "decoded" for what, _ in outcomes)
    assert 100 < num_decoded < NUM_VIDEOS - 1000  # the mutations are neither too weak nor too strong


def test_endless_frames_are_refused() -> None:
    with VideoDecoder(VideoLimits(timeout=20.0)) as decoder:
        what, seconds = outcome(decoder, endless())
    assert what != "decoded"
    assert seconds < 1


MATROSKA = bytes.fromhex("1a45dfa39f4286810142f7810142f2810442f381084282847765626d4287810242858102")
JUNK = {  # how a large file begins, and what it repeats
    "mp4": (b"\0\0\0\x14ftypisom\0\0\0\0isom", b"\0\0\0\x08free"),
    "avi": (b"RIFF\xff\xff\xff\xffAVI ", b"LIST\x04\0\0\0abcd"),
    "gif": (b"GIF89a\x01\0\x01\0\0\0\0", b"!\xfe\x01a\0"),
    "matroska": (MATROSKA + b"\x18\x53\x80\x67\x01" + b"\xff" * 7, b"\xec\x80"),
}


@pytest.mark.parametrize("shape", JUNK)
def test_much_of_nothing(shape: str) -> None:
    """Files whose headers a demuxer searches to the end."""
    head, piece = JUNK[shape]
    with VideoDecoder(VideoLimits(patience=0.25)) as decoder:
        outcome(decoder, b"none")  # the process starts
        what, seconds = outcome(decoder, head + piece * ((48 << 20) // len(piece)))
        assert outcome(decoder, make_video())[0] == "decoded"
    assert what == "the process that decodes it found nothing more in it for too long"
    assert seconds < 1


@pytest.mark.parametrize("text", PLAYLISTS)
def test_playlists_are_refused(text: bytes) -> None:
    with VideoDecoder() as decoder:
        what, _ = outcome(decoder, text)
    assert what.startswith("it is broken, or not of a kind that is read")
