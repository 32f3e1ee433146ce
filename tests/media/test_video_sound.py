"""The sound track of a video: it is laid out from the video's first frame on, wherever it begins."""

import io
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from flexjudge_fast.errors import MediaError
from flexjudge_fast.media.audio_pool import AudioDecoder
from tests.media.sounds import add_sound, load, make_sound, tones
from tests.media.videos import make_video, picture

RATE = 48_000
SOUND = np.round(tones(RATE, RATE, 2) * 32767).astype(np.int16) / np.float32(32768)


@pytest.fixture(scope="module")
def decoder() -> Iterator[AudioDecoder]:
    with AudioDecoder() as decoder:
        yield decoder


def film(container: str, codec: str, seen: float = 0.0, heard: float = 0.0) -> bytes:
    """A second of video that begins at `seen` seconds, and of sound that begins at `heard`."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        video: Any = output.add_stream("mpeg4", rate=10)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        sound: Any = output.add_stream(codec, rate=RATE, layout="stereo")
        for i in range(10):
            frame = av.VideoFrame.from_ndarray(picture(i, 64, 48), format="rgb24")
            frame.pts, frame.time_base = i + round(10 * seen), Fraction(1, 10)
            output.mux(video.encode(frame))
        output.mux(video.encode())
        add_sound(output, sound, SOUND, RATE, heard)
    return file.getvalue()


def test_the_sound_of_a_video(decoder: AudioDecoder, tmp_path: Path) -> None:
    data = film("mp4", "aac")
    path = tmp_path / "a.mp4"
    path.write_bytes(data)
    found = load(decoder, path, "video")
    assert (found.mode, found.rate, found.channels) == ("aac", 48_000, 2)
    assert abs(len(found.samples) - 16_000) < 700
    assert load(decoder, data).digest == found.digest  # as a sound, it is the same


@pytest.mark.parametrize(("container", "codec"), [("matroska", "flac"), ("mov", "pcm_s16le")])
@pytest.mark.parametrize(("seen", "heard"), [(0.0, 1.0), (0.0, 7.5), (0.5, 0.0), (0.5, 1.0), (0.3, 0.3)])
def test_a_track_that_begins_elsewhere(
    decoder: AudioDecoder, container: str, codec: str, seen: float, heard: float
) -> None:
    """Silence stands where it begins late; what is before the first frame is cut."""
    data = film(container, codec, seen, heard)
    late = round((heard - seen) * RATE)
    wanted = np.concatenate((np.zeros((late, 2), np.float32), SOUND)) if late > 0 else SOUND[-late:]
    found = load(decoder, data, "video")
    assert found.digest == load(decoder, (wanted, RATE)).digest
    assert np.array_equal(found.samples, load(decoder, (wanted, RATE)).samples)
    assert load(decoder, data).digest == load(decoder, (SOUND, RATE)).digest  # as a sound, it is all there


def test_a_track_far_away(decoder: AudioDecoder) -> None:
    with pytest.raises(MediaError, match=r"3\.0 s or more: longer than the 2 s allowed"):
        load(decoder, film("mov", "pcm_s16le", heard=3.0), "video", chunk_length=2)
    with pytest.raises(MediaError, match="it holds no samples"):
        load(decoder, film("mov", "pcm_s16le", seen=3.0), "video")


def test_a_video_without_sound(decoder: AudioDecoder) -> None:
    hint = "; give a video with a sound track, or use_audio_in_video=False"
    for kind, ending in (("video", hint), ("audio", "")):
        with pytest.raises(MediaError, match=f"it holds no sound{ending}$"):
            load(decoder, make_video(), kind)
    wav = make_sound("wav", SOUND, RATE)
    assert load(decoder, wav, "video").digest == load(decoder, wav).digest  # no frames to begin with
