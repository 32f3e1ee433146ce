"""Sound from every source becomes the same features; what is broken or over a limit is refused."""

import base64
import io
import math
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
import torch
from numpy.typing import NDArray

from flexjudge_fast.errors import MediaError
from flexjudge_fast.media.audio import prepare_audio
from flexjudge_fast.media.audio_limits import AudioLimits
from flexjudge_fast.media.audio_pool import AudioDecoder
from flexjudge_fast.media.audio_processor import AudioProcessor
from flexjudge_fast.media.items import MediaItem
from flexjudge_fast.media.log_mel import log_mel
from flexjudge_fast.media.prepared import PreparedAudio
from flexjudge_fast.media.sound import SoundBuilder
from tests.media.sounds import FORMATS, load, make_sound, tones

PROCESSOR = AudioProcessor()
LOSSLESS = {"wav-float": 0.0, "wav": 4e-5, "flac": 2e-5, "mka": 2e-5, "aiff": 1e-6, "wav-u8": 1e-2}


@pytest.fixture(scope="module")
def decoder() -> Iterator[AudioDecoder]:
    with AudioDecoder() as decoder:
        yield decoder


def prepare(decoder: AudioDecoder, source: object) -> PreparedAudio:
    return prepare_audio(MediaItem("audio", source, "sounds[0]"), PROCESSOR, b"", decoder)


def spectrum_peaks(samples: NDArray[np.float32], rate: int) -> float:
    """Hz of the strongest tone."""
    return float(np.argmax(np.abs(np.fft.rfft(samples))) * rate / len(samples))


@pytest.mark.parametrize("rate", [16_000, 48_000])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format(decoder: AudioDecoder, name: str, channels: int, rate: int) -> None:
    samples = tones(rate, rate, channels)
    found = load(decoder, make_sound(name, samples, rate))
    expected = load(decoder, (samples, rate)).samples
    assert (found.rate, found.channels, found.sampling_rate) == (rate, channels, 16_000)
    assert found.samples.dtype == np.float32 and found.samples.ndim == 1
    assert abs(len(found.samples) - 16_000) <= 2048  # codecs add up to two frames of their own
    assert abs(spectrum_peaks(found.samples, 16_000) - spectrum_peaks(expected, 16_000)) < 230
    if name in LOSSLESS:
        assert np.abs(found.samples - expected).max() <= LOSSLESS[name]


def test_mono_and_rate_by_soxr(decoder: AudioDecoder) -> None:
    """The mean of the channels, resampled in one go, is what the blocks give."""
    samples = tones(3 * 44_100 + 17, 44_100, 2)
    expected = soxr.resample(samples.mean(axis=1), 44_100, 16_000, "HQ")
    for source in ((samples, 44_100), make_sound("wav-float", samples, 44_100)):
        assert np.array_equal(load(decoder, source).samples, expected)
    same = load(decoder, (samples[:, :1], 16_000))
    assert np.array_equal(same.samples, samples[:, 0])


def test_blocks_do_not_matter() -> None:
    samples = tones(30_000, 22_050, 2)
    found = []
    for size in (30_000, 4096, 101):
        builder = SoundBuilder(22_050, 2, "float32", 16_000, AudioLimits())
        for i in range(0, len(samples), size):
            builder.add(samples[i : i + size])
        found.append(builder.finish())
    assert len({sound.digest for sound in found}) == 1
    assert all(np.array_equal(sound.samples, found[0].samples) for sound in found)


def test_sources_of_one_file(decoder: AudioDecoder, tmp_path: Path) -> None:
    data = make_sound("flac", tones(8000, 16_000), 16_000)
    path = tmp_path / "a.flac"
    path.write_bytes(data)
    url = "data:audio/flac;base64," + base64.b64encode(data).decode()
    sources = [path, str(path), data, bytearray(data), memoryview(data), url]
    found = [prepare(decoder, source) for source in sources]
    assert len({audio.key for audio in found}) == 1
    assert all(np.array_equal(audio.features, found[0].features) for audio in found)
    assert found[0].kind == "audio" and found[0].seconds == 0.5
    assert found[0].features.shape == (128, 50) and found[0].num_tokens == 12


def test_sources_of_the_same_samples(decoder: AudioDecoder) -> None:
    """How samples are stored is no part of the key."""
    samples = np.round(tones(4000, 16_000, 2) * 32767).astype(np.int16)
    floats = (samples / 32768).astype(np.float32)
    sources: list[object] = [make_sound(name, samples, 16_000) for name in ("wav", "flac", "aiff")]
    sources += [make_sound("wav-float", floats, 16_000), (samples, 16_000), (floats, 16_000)]
    found = [prepare(decoder, source) for source in sources]
    assert len({audio.key for audio in found}) == 1
    assert all(np.array_equal(audio.features, found[0].features) for audio in found)


TYPES = {
    "uint8": lambda x: np.round(x * 127 + 128).astype(np.uint8),
    "int16": lambda x: np.round(x * 32767).astype(np.int16),
    "int32": lambda x: np.round(x.astype(np.float64) * (2**31 - 1)).astype(np.int32),
    "float32": lambda x: x,
    "float64": lambda x: x.astype(np.float64),
}


@pytest.mark.parametrize("name", TYPES)
def test_types_of_samples(decoder: AudioDecoder, name: str) -> None:
    """Arrays, tensors and the files that hold them give the same samples."""
    samples = tones(4000, 16_000, 2)
    array = TYPES[name](samples)
    found = load(decoder, (array, 16_000))
    assert found.mode == name
    assert np.abs(found.samples - samples.mean(axis=1)).max() <= (0.01 if name == "uint8" else 4e-5)
    swapped = array.astype(array.dtype.newbyteorder())
    sources = [array.T, array.T.copy(), swapped, torch.from_numpy(array), torch.from_numpy(array).T]
    others = [(source, 16_000) for source in sources]
    others += [{"array": array, "sampling_rate": 16_000, "path": None}, (array, 16_000.0)]
    for source in others:
        assert load(decoder, source).digest == found.digest
    subtype = {"uint8": "PCM_U8", "int16": "PCM_16", "int32": "PCM_32", "float32": "FLOAT"}.get(
        name, "DOUBLE"
    )
    file = io.BytesIO()
    if name == "uint8":
        file.write(wav_of_bytes(array))
    else:
        soundfile.write(file, array, 16_000, subtype, format="WAV")
    assert np.array_equal(load(decoder, file.getvalue()).samples, found.samples)


def wav_of_bytes(array: NDArray[np.uint8]) -> bytes:
    body = array.tobytes()
    form = struct.pack("<HHIIHH", 1, array.shape[1], 16_000, 16_000 * array.shape[1], array.shape[1], 8)
    chunks = b"fmt " + struct.pack("<I", 16) + form + b"data" + struct.pack("<I", len(body)) + body
    return b"RIFF" + struct.pack("<I", len(chunks) + 4) + b"WAVE" + chunks


def test_half_precision(decoder: AudioDecoder) -> None:
    """Every float16 and every bfloat16 is a float32."""
    samples = torch.from_numpy(tones(4000, 16_000)[:, 0])
    for half in (samples.half(), samples.bfloat16(), samples.half().numpy()):
        single = torch.as_tensor(half).float()
        assert np.array_equal(load(decoder, (half, 16_000)).samples, single.numpy())
        assert prepare(decoder, (half, 16_000)).key == prepare(decoder, (single, 16_000)).key
    for odd in (math.inf, math.nan):
        with pytest.raises(MediaError, match=r"a sample of (inf|nan)"):
            load(decoder, (torch.full((100,), odd, dtype=torch.bfloat16), 16_000))


def test_full_scale(decoder: AudioDecoder) -> None:
    extremes = {
        np.uint8: (0, 255, 128),
        np.int16: (-(2**15), 2**15 - 1, 0),
        np.int32: (-(2**31), 2**31 - 1, 0),
    }
    for dtype, values in extremes.items():
        low, high, zero = load(decoder, (np.array(values, dtype), 16_000)).samples
        assert low == -1.0 and 0.99 < high <= 1.0 and zero == 0.0
    loud = np.array([-1.5, 1.5, 16.0], np.float32)
    assert np.array_equal(load(decoder, (loud, 16_000)).samples, loud)  # kept, not clipped


def test_silence_and_short_sounds(decoder: AudioDecoder) -> None:
    """10 ms are one frame, which gives no token: silence is added up to three."""
    silence = prepare(decoder, (np.zeros(16_000, np.int16), 16_000))
    assert (silence.features == silence.features[0, 0]).all() and silence.num_tokens == 25
    for count in (1, 160, 320, 480):
        samples = tones(count, 16_000)[:, 0]
        short = prepare(decoder, (samples, 16_000))
        padded = np.concatenate([samples, np.zeros(480 - count, np.float32)])
        assert short.num_tokens == 1
        assert np.array_equal(short.features, log_mel(padded, PROCESSOR))
    for samples, rate in ((np.zeros(0, np.float32), 16_000), (np.zeros(1, np.float32), 44_100)):
        with pytest.raises(MediaError, match="that is no sound"):
            prepare(decoder, (samples, rate))


def test_long_sounds(decoder: AudioDecoder) -> None:
    """The longest sound is read; a sample more is refused, whatever the source."""
    longest = np.zeros(300 * 8000, np.int16)
    audio = prepare(decoder, (longest, 8000))
    assert audio.features.shape == (128, 30_000) and audio.num_tokens == 7500
    more = np.zeros(300 * 8000 + 1, np.int16)
    for source in ((more, 8000), make_sound("flac", more[:, None], 8000)):
        with pytest.raises(MediaError, match=r"300\.0 s or more: longer than the 300 s allowed"):
            prepare(decoder, source)
    assert len(load(decoder, make_sound("flac", longest[:, None], 8000)).samples) == 4_800_000
    with pytest.raises(MediaError, match="longer than the 2 s allowed"):
        load(decoder, (longest[:16_001], 8000), chunk_length=2)


def test_headers_lie(decoder: AudioDecoder) -> None:
    """Lengths are counted while decoding, whatever the header says."""
    data = bytearray(make_sound("flac", np.zeros((8000 * 400, 1), np.int16), 8000))
    for total in (0, 8000, 2**36 - 1):  # unknown; too few; too many
        value = int.from_bytes(data[18:26], "big") & ~(2**36 - 1) | total
        data[18:26] = value.to_bytes(8, "big")
        try:
            assert len(load(decoder, bytes(data)).samples) <= 300 * 16_000
        except MediaError as error:
            assert "longer than the 300 s allowed" in str(error)
    endless = bytearray(make_sound("wav", tones(800, 16_000), 16_000))
    endless[40:44] = b"\xff\xff\xff\xff"
    assert len(load(decoder, bytes(endless)).samples) == 800
    hasty = bytearray(make_sound("wav", tones(800, 16_000), 16_000))
    hasty[24:28] = struct.pack("<I", 1)
    with pytest.raises(MediaError, match="a rate of 1;"):
        load(decoder, bytes(hasty))


ONE = np.zeros(100, np.float32)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (ONE, r"float32 \[100\]: give samples with their rate"),
        ((16_000, ONE), r"the other way round: give \(samples, rate\)"),
        ((16_000, torch.zeros(100)), r"the other way round: give \(samples, rate\)"),
        ((ONE, np.array(16_000)), "a rate of type ndarray; give a plain number"),
        ((ONE, torch.tensor(16_000)), "a rate of type Tensor; give a plain number"),
        ((ONE,), "a tuple of 1"),
        ({"array": ONE}, 'must have "array" and "sampling_rate"'),
        (([0.0, 0.1], 16_000), "samples of type list"),
        ((ONE, "16000"), "a rate of type str"),
        ((ONE, True), "a rate of type bool"),
        ((ONE, 0), "a rate of 0;"),
        ((ONE, -16_000), "a rate of -16000;"),
        ((ONE, 16_000.5), "a rate of 16000.5;"),
        ((ONE, math.nan), "a rate of nan;"),
        ((ONE, math.inf), "a rate of inf;"),
        ((ONE, 10**30), "a rate of 10+;"),
        ((np.zeros((9, 100), np.float32), 16_000), "9 channels; 1 to 8 are read"),
        ((np.zeros((100, 100), np.float32), 16_000), "which dimension is the channels"),
        ((np.zeros((0, 100), np.float32), 16_000), "0 channels"),
        ((np.zeros((1, 2, 100), np.float32), 16_000), r"shape \[1, 2, 100\]"),
        ((np.array(0.5), 16_000), r"shape \[\]"),
        ((np.zeros(100, np.longdouble), 16_000), "samples of float128; uint8, int16"),
        ((np.zeros(100, np.int64), 16_000), "samples of int64"),
        ((np.zeros(100, bool), 16_000), "samples of bool"),
        ((np.zeros(100, complex), 16_000), "samples of complex128"),
        ((np.array(["a"]), 16_000), "samples of str"),
        ((np.array([None]), 16_000), "samples of object"),
        ((torch.zeros(100, dtype=torch.float8_e4m3fn), 16_000), "samples of float8_e4m3fn"),
        ((np.array([0.0, math.nan]), 16_000), "a sample of nan"),
        ((np.array([0.0, -math.inf], np.float32), 16_000), "a sample of inf"),
        ((np.array([0.0, 1e300]), 16_000), "a sample of inf"),
        ((np.array([0.0, 16.1]), 16_000), r"a sample of 16\.1; give finite values in -1\.\.1"),
        (None, "NoneType is not a path, bytes or URL"),
        (3.5, "float is not a path, bytes or URL"),
        (b"", "it is empty|the file is empty"),
        ("/none/a.wav", "cannot be opened: No such file"),
        ("/dev/zero", "not a regular file"),
        ("a\0b", "cannot be opened"),
        ("file:///etc/passwd", "file: URLs are not read"),
        ("https://example.com/a.wav", "allow_remote=True only"),
        ("data:audio/wav,abc", "data URL must be"),
        (b"no sound at all", "broken, or not of a kind that is read"),
        (b"RIFF no sound at all", "broken, or not of a kind that is read"),
        (b"#EXTM3U\n#EXTINF:1,\n/etc/passwd\n", "broken, or not of a kind that is read"),
        (b"ffconcat version 1.0\nfile '/etc/passwd'\n", "broken, or not of a kind that is read"),
    ],
)
def test_what_is_refused(decoder: AudioDecoder, source: object, message: str) -> None:
    with pytest.raises(MediaError, match=rf"^sounds\[0\]: .*({message})"):
        load(decoder, source)


def test_a_file_that_holds_nan(decoder: AudioDecoder) -> None:
    data = make_sound("wav-float", np.array([[0.0], [math.nan]], np.float32), 16_000)
    with pytest.raises(MediaError, match="a sample of nan"):
        load(decoder, data)
    assert all(worker.healthy for worker in decoder._all)  # no reason to end the process


def test_limits_of_files() -> None:
    data = make_sound("wav", tones(8000, 16_000), 16_000)
    with AudioDecoder(AudioLimits(max_file_bytes=1000, max_video_bytes=20_000)) as decoder:
        url = "data:audio/wav;base64," + base64.b64encode(data).decode()
        for source in (data, url):
            with pytest.raises(MediaError, match=r"16,?04\d bytes"):
                load(decoder, source)
        assert load(decoder, data, "video").rate == 16_000
    with AudioDecoder(AudioLimits(max_channels=1)) as decoder:
        for source in (make_sound("wav", tones(80, 16_000, 2), 16_000), (tones(80, 16_000, 2), 16_000)):
            with pytest.raises(MediaError, match="2 channels; 1 to 1 are read"):
                load(decoder, source)
