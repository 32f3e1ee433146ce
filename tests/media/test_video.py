"""Videos are what a plain PyAV decoding gives, sampled and resized; what cannot be read is a MediaError."""

import io
import os
from collections.abc import Iterator
from fractions import Fraction
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from flexjudge_fast.errors import MediaError
from flexjudge_fast.media import video_decode
from flexjudge_fast.media.items import MediaItem, MediaOptions
from flexjudge_fast.media.video import DecodedVideo, VideoDecoder, decode_video
from flexjudge_fast.media.video_limits import VideoLimits
from flexjudge_fast.media.video_sampling import FrameBudget, frame_indices
from tests.media.videos import FORMATS, make_video, picture, plain_frames

BUDGET = FrameBudget(min_pixels=16 * 28 * 28, max_pixels=64 * 28 * 28)


@pytest.fixture(scope="module")
def decoder() -> Iterator[VideoDecoder]:
    with VideoDecoder() as decoder:
        yield decoder


def load_frame(item: MediaItem) -> NDArray[np.uint8]:
    """Stands in for the loader of images."""
    source: Any = item.source
    try:
        image = source if isinstance(source, Image.Image) else Image.open(source)
        return np.asarray(image.convert("RGB"))
    except OSError as error:
        raise MediaError(f"{item.name}: {error}") from error


def read(decoder: VideoDecoder, source: object, **options: Any) -> DecodedVideo:
    item = MediaItem("video", source, "videos[0]")
    return decode_video(item, MediaOptions(**options), BUDGET, decoder, load_frame)


def resized(frames: list[NDArray[np.uint8]], like: DecodedVideo) -> NDArray[np.uint8]:
    size = (like.frames.shape[2], like.frames.shape[1])
    return np.stack([np.asarray(Image.fromarray(f).resize(size, Image.Resampling.BICUBIC)) for f in frames])


def digest_of(frames: list[NDArray[np.uint8]]) -> bytes:
    height, width = frames[0].shape[:2]
    digest = blake2b(f"RGB {width} {height};".encode(), digest_size=32)
    for frame in frames:
        digest.update(frame.tobytes())
    return digest.digest()


@pytest.mark.parametrize("num_frames", [1, 2, 3, 8, 21])
@pytest.mark.parametrize("name", FORMATS)
def test_frames_are_those_of_a_plain_decoding(decoder: VideoDecoder, name: str, num_frames: int) -> None:
    if name == "ts-mpeg2" and num_frames < 8:
        pytest.skip("FFmpeg does not recognise a transport stream of a few packets")
    data = make_video(name, num_frames)
    video = read(decoder, data, fps=6.0)
    frames, times = plain_frames(data)
    assert len(frames) == num_frames
    taken = [frames[i] for i in video.indices]
    assert list(video.indices) == frame_indices(num_frames, len(video.indices))
    np.testing.assert_array_equal(video.frames, resized(taken, video))
    assert video.digest == digest_of(taken)
    assert video.size == (64, 48)
    assert video.times == pytest.approx([times[i] - times[0] for i in video.indices])
    if num_frames > 2:
        assert video.fps == pytest.approx(25, rel=0.02)
        assert video.seconds_per_grid == pytest.approx(2 * num_frames / len(video.indices) / 25, rel=0.02)


@pytest.mark.parametrize("fps", [1, 10, 24, Fraction(30000, 1001), 60])
@pytest.mark.parametrize("name", ["mp4-h264", "webm-vp9", "avi-mpeg4"])
def test_rates_are_exact(decoder: VideoDecoder, name: str, fps: Fraction | int) -> None:
    video = read(decoder, make_video(name, 31, fps=fps))
    assert video.fps == pytest.approx(float(fps), rel=1e-3)
    assert len(video.indices) == max(4, min(30, int(31 / fps * 2) // 2 * 2))


def test_paths_and_bytes_are_one(decoder: VideoDecoder, tmp_path: Path) -> None:
    data = make_video()
    path = tmp_path / "a.mp4"
    path.write_bytes(data)
    videos = [read(decoder, source) for source in (data, bytearray(data), memoryview(data), path, str(path))]
    for video in videos:
        np.testing.assert_array_equal(video.frames, videos[0].frames)
        assert (video.digest, video.indices, video.times) == (videos[0].digest, (0, 3, 5, 8), videos[0].times)


def test_a_variable_rate_is_averaged(decoder: VideoDecoder) -> None:
    times = [0, 40, 80, 120, 500, 1000, 1040, 1080, 2000, 2040]
    video = read(decoder, make_video("webm-vp8", 10, times=times))
    assert video.fps == pytest.approx(10 / 2.08)  # the last frame is shown for 40 ms
    assert video.times == pytest.approx([times[i] / 1000 for i in video.indices])


@pytest.mark.parametrize(("angle", "turns"), [(90, 1), (180, 2), (-90, 3)])
def test_rotation_is_applied(decoder: VideoDecoder, angle: int, turns: int) -> None:
    data = make_video(rotation=angle)
    video = read(decoder, data)
    frames, _ = plain_frames(data)
    upright = [np.rot90(frames[i], turns) for i in video.indices]
    np.testing.assert_array_equal(video.frames, resized(upright, video))
    assert video.size == ((48, 64) if turns % 2 else (64, 48))
    assert video.digest == digest_of(upright)


@pytest.mark.parametrize("error", [-3, -1, 1, 40])
def test_frames_that_packets_did_not_tell(monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    """Hidden frames, fields: the packets give another number, and the real frames are sampled anyway."""
    file = io.BytesIO(make_video(num_frames=12))
    expected = list(video_decode.decode(file, BUDGET, VideoLimits()))
    survey = video_decode.survey_packets

    def wrong(*args: Any) -> video_decode.Survey:
        right = survey(*args)
        return video_decode.Survey(right.total + error, right.duration, right.stated)

    monkeypatch.setattr(video_decode, "survey_packets", wrong)
    parts = list(video_decode.decode(file, BUDGET, VideoLimits()))
    starts = [i for i, part in enumerate(parts) if isinstance(part, video_decode.Start)]
    assert len(starts) == 2
    assert parts[starts[1] :] == expected


def test_a_video_without_its_first_packet(decoder: VideoDecoder) -> None:
    """Nothing can be shown before the next key frame: fewer frames than packets, at the same rate."""
    import av

    file = io.BytesIO()
    data = make_video(num_frames=30, options={"g": "8", "bf": "0"})
    with av.open(io.BytesIO(data)) as whole, av.open(file, "w", format="matroska") as output:
        stream = output.add_stream_from_template(whole.streams.video[0])
        for packet in list(whole.demux(video=0))[1:-1]:
            packet.stream = stream
            output.mux(packet)
    frames, _ = plain_frames(file.getvalue())
    assert len(frames) < 29
    video = read(decoder, file.getvalue())
    assert video.indices[-1] == len(frames) - 1
    assert video.digest == digest_of([frames[i] for i in video.indices])
    assert video.fps == 25


def test_a_video_cut_short_is_sampled_as_far_as_it_goes(decoder: VideoDecoder) -> None:
    data = make_video("ts-mpeg2", 12)
    frames, _ = plain_frames(data)
    cut = data[: len(data) - 188 * 3]
    left, _ = plain_frames(cut)
    assert 0 < len(left) <= len(frames)
    assert read(decoder, cut).indices[-1] == len(left) - 1


LIMITS = [
    ({"max_file_bytes": 100}, "over the limit of 100"),
    ({"max_side": 63}, "64x48 pixels is over"),
    ({"max_frame_pixels": 64 * 48 - 1}, "64x48 pixels is over|broken, or its frames are over"),
    ({"max_frames": 8}, "9 frames: over the limit of 8"),
    ({"max_duration": 0.1}, "duration of 0 s: over the limit of 0.1"),
    ({"max_decoded_pixels": 64 * 48 * 8}, "27648 pixels to decode: over"),
    ({"max_output_bytes": 10_000}, "bytes of resized frames: over the limit of 10000"),
    ({"timeout": 1e-9}, "longer than 1e-09 s"),
]


@pytest.mark.parametrize(("limits", "message"), LIMITS)
def test_limits(limits: dict[str, Any], message: str) -> None:
    with VideoDecoder(VideoLimits(**limits)) as decoder, pytest.raises(MediaError, match=message):
        read(decoder, make_video())


# Time stamps are read once, so a duration is not among those.
@pytest.mark.parametrize(("limits", "message"), [*LIMITS[1:4], *LIMITS[5:7]])
def test_limits_hold_where_headers_lie(
    monkeypatch: pytest.MonkeyPatch, limits: dict[str, Any], message: str
) -> None:
    """The survey saw nothing wrong; real frames are measured again."""
    file = io.BytesIO(make_video())
    harmless = video_decode.Survey(4, 0.36, 25.0)
    monkeypatch.setattr(video_decode, "survey_packets", lambda *_: harmless)
    with pytest.raises(MediaError, match=message):
        list(video_decode.decode(file, BUDGET, VideoLimits(**limits)))


HOSTILE = {
    "empty": (b"", "empty"),
    "text": (b"hello" * 50, "broken, or not of a kind"),
    "hls": (
        b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/passwd\n",
        "broken, or not of a kind",
    ),
    "concat": (b"ffconcat version 1.0\nfile '/etc/passwd'\n", "broken, or not of a kind"),
    "dash": (b'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"></MPD>', "broken, or not"),
    "sdp": (b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n", "broken"),
    "png": (b"\x89PNG\r\n\x1a\n" + bytes(64), "broken, or not of a kind"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_video_is_refused(decoder: VideoDecoder, name: str) -> None:
    data, message = HOSTILE[name]
    with pytest.raises(MediaError, match=rf"^videos\[0\]: {len(data)} bytes: .*{message}"):
        read(decoder, data)


def test_a_huge_frame_is_refused_by_its_header(decoder: VideoDecoder) -> None:
    gif = make_video("gif")
    with pytest.raises(MediaError, match=r"65535x65535 pixels|broken, or its frames are over"):
        read(decoder, gif[:6] + b"\xff" * 4 + gif[10:])
    with pytest.raises(MediaError, match="frames are over the limit of 9437184 pixels"):
        read(decoder, make_video("avi-mjpeg", 1, (4200, 2400)))


def test_a_size_that_only_the_container_claims_is_not_believed(decoder: VideoDecoder) -> None:
    data = make_video()
    at = data.index(b"avc1", data.index(b"stsd")) + 4 + 24
    claimed = data[:at] + (16384).to_bytes(2, "big") * 2 + data[at + 4 :]
    assert read(decoder, claimed).digest == read(decoder, data).digest


@pytest.mark.parametrize(
    ("container", "sound"), [("mp4", "aac"), ("webm", "libopus"), ("matroska", "pcm_s16le")]
)
def test_sound_beside_a_video_is_ignored(decoder: VideoDecoder, container: str, sound: str) -> None:
    """Its decoder is not on the list, and is never opened."""
    import av

    codec = "libvpx-vp9" if container == "webm" else "libx264"
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        voice: Any = output.add_stream(sound, rate=48_000)
        stream: Any = output.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(12):
            output.mux(stream.encode(av.VideoFrame.from_ndarray(picture(i, 64, 48), format="rgb24")))
        noise = av.AudioFrame.from_ndarray(np.zeros((1, 24_000), np.int16), format="s16", layout="mono")
        noise.sample_rate = 48_000
        output.mux([*voice.encode(noise), *voice.encode(), *stream.encode()])
    data = file.getvalue()
    video = read(decoder, data)
    frames, _ = plain_frames(data)
    assert video.indices == (0, 4, 7, 11)
    assert video.digest == digest_of([frames[i] for i in video.indices])


def test_sound_alone_is_no_video(decoder: VideoDecoder) -> None:
    import av

    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as output:
        stream = output.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        output.mux(stream.encode(frame))
    with pytest.raises(MediaError, match="holds no video"):
        read(decoder, file.getvalue())


def test_what_cannot_be_opened_is_refused(decoder: VideoDecoder, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for source, message in [
        (tmp_path / "none.mp4", "cannot be opened: No such file"),
        (tmp_path, "not a regular file"),
        (tmp_path / "pipe", "not a regular file"),
        ("a\0b", "cannot be opened"),
        ("https://example.org/a.mp4", "not fetched"),
        (7, "int: give a path, bytes"),
        (np.zeros((4, 4), np.uint8), "give a path, bytes"),
    ]:
        with pytest.raises(MediaError, match=rf"^videos\[0\]: .*{message}"):
            read(decoder, source)


def test_frames_one_by_one(decoder: VideoDecoder, tmp_path: Path) -> None:
    pictures = [picture(i, 64, 48) for i in range(5)]
    for i, image in enumerate(pictures):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    paths = [tmp_path / f"{i}.png" for i in range(5)]
    for source in (pictures, tuple(pictures), np.stack(pictures), [*map(Image.fromarray, pictures)], paths):
        video = read(decoder, source, fps=4.0)
        np.testing.assert_array_equal(video.frames, resized(pictures, video))
        assert video.digest == digest_of(pictures)
        assert video.times == (0.0, 0.25, 0.5, 0.75, 1.0)
        assert (video.indices, video.fps, video.seconds_per_grid) == ((0, 1, 2, 3, 4), 4.0, 0.5)
        assert (video.size, video.mode) == ((64, 48), "RGB")
    flipped = [image[:, ::-1] for image in pictures]  # not contiguous
    assert read(decoder, flipped).digest == digest_of(flipped)


def test_frames_that_do_not_fit_are_refused(decoder: VideoDecoder) -> None:
    one = picture(0, 64, 48)
    for source, message in [
        ([], "0 frames; give 1 to 768"),
        ([one] * 769, "769 frames; give 1 to 768"),
        ([one, picture(0, 64, 50)], "2 frames: frame 1 is 64x50, the first 64x48"),
        ([one, one.astype(np.float32)], "float32"),
        ([one, one[..., 0]], r"\[1\]: uint8 \[48, 64\]"),
        (np.zeros((2, 4, 4, 4), np.uint8), r"uint8 \[4, 4, 4\]; a frame is"),
        (np.zeros((1, 2, 9000, 3), np.uint8), "9000x2 pixels is over"),
        (np.zeros((1, 2, 1000, 3), np.uint8), "more than 200 times"),
        ([one, "/none.png"], r"\[1\]: .*No such file"),
    ]:
        with pytest.raises(MediaError, match=rf"^videos\[0\].*{message}"):
            read(decoder, source)
