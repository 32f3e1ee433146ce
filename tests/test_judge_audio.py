"""Judging recordings, and videos that are heard: read once, told apart, and harmless when broken."""

import io
import json

import av
import numpy as np
import pytest
import soundfile

from flexjudge_fast import (
    Engine,
    Judge,
    Judgement,
    MediaError,
    RequestTooLargeError,
    Response,
    UnsupportedMediaError,
)
from flexjudge_fast.media import reader
from tests.media.videos import make_video
from tests.models import write_omni_checkpoint, write_vision_checkpoint
from tests.test_judge_media import QUICK, clip, picture, plain

RATE = 16000


def tone(hertz, seconds=0.4, rate=RATE):
    time = np.arange(int(seconds * rate)) / rate
    return (0.3 * np.sin(2 * np.pi * hertz * time)).astype(np.float32)


def wav(samples, rate=RATE, kind="WAV"):
    out = io.BytesIO()
    soundfile.write(out, samples, rate, format=kind)
    return out.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("omni")
    write_omni_checkpoint(path)
    return path


@pytest.fixture
def judge(folder):
    with Engine.from_pretrained(folder, kv_cache_memory="128MiB") as engine:
        yield Judge(engine)


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """Two seconds of video with a sound track."""
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    with av.open(str(path), "w") as file:
        video = file.add_stream("mpeg4", rate=8)
        video.width, video.height, video.pix_fmt = 96, 64, "yuv420p"
        audio = file.add_stream("aac", rate=RATE, layout="mono")
        for i in range(16):
            for packet in video.encode(av.VideoFrame.from_image(picture(i, 96, 64))):
                file.mux(packet)
        samples = av.AudioFrame.from_ndarray(tone(440, 2.0)[None], format="flt", layout="mono")
        samples.sample_rate = RATE
        for packet in audio.encode(samples):
            file.mux(packet)
        for stream in (video, audio):
            for packet in stream.encode(None):
                file.mux(packet)
    return path


@pytest.mark.parametrize(("method", "count"), [("score", 1), ("compare", 2), ("rank", 3), ("choose", 2)])
def test_candidates_that_are_recordings(judge, method, count):
    given = [Response(audio=(tone(200 + 100 * i), RATE)) for i in range(count)]
    scale = {} if method == "choose" else {"scale": (1.0, 5.0)}
    verdict = getattr(judge, method)("Sing.", given[0] if method == "score" else given, **scale, **QUICK)
    assert verdict.finish_reason == "answer"
    judge.engine.check_integrity()


def test_same_speaker_and_mixed_media(judge):
    sounds = [(tone(200), RATE), wav(tone(300))]
    assert judge.choose("Same speaker?", ["Yes.", "No."], audios=sounds, **QUICK).choice is not None
    verdict = judge.score(
        "All?", Response("A", audio=sounds[0]), images=[picture(1)], videos=[clip(2)], **QUICK
    )
    assert verdict.finish_reason == "answer"
    assert judge.engine.stats().num_encoded_media == 4  # the first recording is the response, too


def test_recordings_of_one_length_are_never_mixed_up(folder, judge):
    items = [Judgement("score", "Q", ("A",), audios=((tone(200 + 50 * i), RATE),), **QUICK) for i in range(4)]
    together = {v.index: plain(v) for v in judge.run(items)}
    assert len({json.dumps(v["score_probs"]) for v in together.values()}) == 4
    for i, item in enumerate(items):
        with Engine.from_pretrained(folder, kv_cache_memory="32MiB") as engine:
            (alone,) = Judge(engine).run([item])
        assert plain(alone) == together[i]


def test_every_source_of_a_recording_is_the_same(judge, tmp_path):
    """Encoded once; and since draws depend on its key, one seed draws the same."""
    samples = (tone(440) * 32767).round().astype(np.int16)  # what a WAV file holds
    path = tmp_path / "a.flac"
    path.write_bytes(wav(samples, kind="FLAC"))
    sources = [wav(samples), path, str(path), {"array": samples, "sampling_rate": RATE}]
    sources.append(((samples / 32768).astype(np.float32), RATE))
    for temperature in (0, 0.8):
        given = {"temperature": temperature, "seed": 3, **QUICK}
        verdicts = [judge.score("Q", "A", audios=[source], **given) for source in sources]
        assert all(plain(verdict) == plain(verdicts[0]) for verdict in verdicts)
    assert judge.engine.stats().num_encoded_media == 1


@pytest.mark.parametrize(
    "bad",
    [
        {"audios": (b"no sound",)},
        {"audios": ("/no/such/file.wav",)},
        {"audios": (wav(tone(440))[:30],)},
        {"audios": ((np.full(800, np.nan, np.float32), RATE),)},
        {"audios": (tone(440),)},
        {"audios": ("https://example.com/a.wav",)},
        {"videos": (clip(1),), "use_audio_in_video": True},
        {"videos": ([picture(0, 96, 64)] * 2,), "use_audio_in_video": True},
        {"videos": (make_video(),), "use_audio_in_video": True},
    ],
)
def test_a_bad_recording_fails_alone(folder, judge, bad):
    """The others' verdicts are those of an engine that never saw it."""
    good = [Judgement("score", f"Q{i}", ("A",), audios=((tone(300 + i), RATE),), **QUICK) for i in range(3)]
    with Engine.from_pretrained(folder, kv_cache_memory="128MiB") as engine:
        wanted = [plain(v) for v in sorted(Judge(engine).run(good), key=lambda v: v.index)]
    found = {v.index: v for v in judge.run([good[0], Judgement("score", "Q", ("A",), **bad), *good[1:]])}
    assert found[1].finish_reason == "error"
    assert found[1].error.startswith(f"MediaError: {next(iter(bad))}[0]")
    assert [plain(found[i]) for i in (0, 2, 3)] == wanted
    if bad.get("use_audio_in_video"):
        assert "use_audio_in_video=False" in found[1].error
    with pytest.raises(MediaError):
        judge.score("Q", "A", **bad)


def test_more_sound_than_the_context_holds_is_not_read_to_the_end(folder, monkeypatch):
    """A thousand references to one long file would else lie decoded in memory before they are refused."""
    read = []
    prepare = reader.prepare_audio
    monkeypatch.setattr(reader, "prepare_audio", lambda *given: read.append(given) or prepare(*given))
    samples = (tone(440, 40.0), RATE)  # 1000 tokens
    with Engine.from_pretrained(folder, kv_cache_memory="32MiB", max_model_len=1900) as engine:
        judge = Judge(engine)
        with pytest.raises(RequestTooLargeError, match=r"audios\[\d+\]: the prompt's media take \d,000"):
            judge.score("Q", "A", audios=[samples] * 40)
        assert len(read) <= 2 + 4  # two are too many; each thread may have begun another
        assert judge.score("Q", "A", audios=[samples], **QUICK).scores


def test_a_film_is_heard(judge, film):
    seen, heard = (
        judge.score("Q", "A", videos=[film], use_audio_in_video=hear, resize=(84, 56), **QUICK)
        for hear in (False, True)
    )
    assert heard.usage.prompt - seen.usage.prompt == pytest.approx(50 + 2, abs=3)  # 25 tokens a second
    assert heard.score_probs != seen.score_probs
    again = judge.score("Q", "A", videos=[film], use_audio_in_video=True, resize=(84, 56), **QUICK)
    assert plain(again) == plain(heard)


def test_a_seeing_model_says_that_it_does_not_hear(tmp_path, film):
    write_vision_checkpoint(tmp_path)
    with Engine.from_pretrained(tmp_path, kv_cache_memory="32MiB") as engine:
        with pytest.raises(UnsupportedMediaError, match="reads text, image and video, not audio"):
            Judge(engine).score("Q", "A", audios=[(tone(440), RATE)])
        with pytest.raises(UnsupportedMediaError, match="does not hear"):
            Judge(engine).score("Q", "A", videos=[film], use_audio_in_video=True)
