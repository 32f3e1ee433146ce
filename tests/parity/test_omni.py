"""Qwen2.5-Omni's Thinker: logits and greedy tokens of transformers for sound, images and heard video."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from flexjudge_fast import Engine, SamplingParams
from flexjudge_fast.engine.engine import EngineInput
from flexjudge_fast.errors import CheckpointError, MediaError
from flexjudge_fast.media.items import MediaItem, MediaOptions
from flexjudge_fast.media.prepared import PreparedMedia
from tests.models import AUDIO_PREPROCESSOR, PREPROCESSOR, write_omni_checkpoint
from tests.parity.test_vision_language import clip, picture, video_patches

GREEDY = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
RATE = 16000


def sound(seconds, seed=0):
    """Tones that come and go, and some noise."""
    rng = np.random.default_rng(seed)
    time = np.arange(int(seconds * RATE)) / RATE
    tones = sum(np.sin(2 * np.pi * rng.uniform(100, 3000) * time) for _ in range(3))
    return (0.1 * tones * np.sin(3 * time) + 0.01 * rng.standard_normal(len(time))).astype(np.float32)


def user(*parts):
    """Messages of one turn: strings, PIL images, frames, videos that were read, arrays of samples."""
    content = []
    for part in parts:
        if isinstance(part, str):
            content.append({"type": "text", "text": part})
        elif isinstance(part, np.ndarray):
            content.append({"type": "audio", "audio": (part, RATE)})
        else:
            kind = "video" if isinstance(part, list | PreparedMedia) else "image"
            content.append({"type": kind, kind: part})
    return [{"role": "system", "content": "Judge."}, {"role": "user", "content": content}]


class Oracle:
    """transformers' answer; sounds and images go through its own processors, positions come from itself."""

    def __init__(self, model):
        from transformers import WhisperFeatureExtractor
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        self.model = model
        size = {"shortest_edge": PREPROCESSOR["min_pixels"], "longest_edge": PREPROCESSOR["max_pixels"]}
        self.images = Qwen2VLImageProcessorPil(size=size)
        self.sounds = WhisperFeatureExtractor(**AUDIO_PREPROCESSOR)

    def inputs(self, prompt, images, sounds):
        ids = torch.tensor([prompt.token_ids])
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if images:
            given |= self.images(images, return_tensors="pt")
        if sounds:
            found = self.sounds(
                sounds,
                sampling_rate=RATE,
                padding="max_length",
                return_attention_mask=True,
                return_tensors="pt",
            )
            given["input_features"] = found["input_features"]
            given["feature_attention_mask"] = found["attention_mask"]
        videos = [run.media for run in prompt.media if run.media.kind == "video" and run.first_row == 0]
        if videos:
            given["pixel_values_videos"] = torch.cat([video_patches(media.frames) for media in videos])
            given["video_grid_thw"] = torch.tensor([media.grid for media in videos])
            given["video_second_per_grid"] = torch.tensor([media.seconds_per_grid for media in videos])
            given["use_audio_in_video"] = videos[0].sound is not None
        return given

    def answer(self, prompt, images=(), sounds=(), count=32):
        """Logits of the prompt [num_tokens, vocab] and `count` greedy tokens."""
        given = self.inputs(prompt, list(images), list(sounds))
        self.model.model.rope_deltas = None
        with torch.inference_mode():
            out = self.model(**given, use_cache=True)
            logits, tokens = out.logits[0], [int(out.logits[0, -1].argmax())]
            for i in range(count - 1):
                place = len(prompt) + i + int(self.model.model.rope_deltas)
                step = {
                    "input_ids": torch.tensor([[tokens[-1]]]),
                    "position_ids": torch.full((3, 1, 1), place),
                }
                out = self.model(**step, past_key_values=out.past_key_values, use_cache=True)
                tokens.append(int(out.logits[0, -1].argmax()))
        return logits, tokens


def media_of(messages):
    """Images and sounds of a turn, as the oracle takes them."""
    parts = messages[1]["content"]
    return [p["image"] for p in parts if p["type"] == "image"], [
        p["audio"][0] for p in parts if p["type"] == "audio"
    ]


CASES = {
    "one sound": user("What is this? ", sound(1.0), "Say."),
    "odd lengths": user(sound(0.777, 1), "and", sound(2.3456, 2), sound(0.031, 3), "which?"),
    "several windows": user(sound(6.54321, 4), "a long one"),
    "sound and image": user("first", sound(0.5, 5), "then", picture(84, 112), "end"),
    "everything": user(picture(60, 90), sound(1.3, 6), "between", clip(5, 70, 98), sound(0.4, 7), "end"),
    "video unheard": user("A clip: ", clip(6, 84, 56)),
    "images": user(picture(140, 100), picture(56, 56, 1), "two"),
    "text": user("nothing to see or hear"),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("omni")
    return folder, Oracle(write_omni_checkpoint(folder))


@pytest.fixture(scope="module")
def engine(tiny):
    return Engine.from_pretrained(tiny[0], kv_cache_memory="256MiB")


@pytest.fixture(scope="module")
def answers(tiny, engine):
    """Of all cases, from transformers."""
    return {name: tiny[1].answer(engine.encode(m), *media_of(m)) for name, m in CASES.items()}


@pytest.mark.parametrize("name", CASES)
def test_logits_and_greedy(engine, answers, name):
    logits, tokens = answers[name]
    assert (engine.logits(CASES[name]) - logits).abs().max() < 1e-4
    assert list(engine.generate([CASES[name]], GREEDY)[0].token_ids) == tokens


@pytest.mark.parametrize("backend", ["compiled", "reference"])
def test_batch_cold_and_warm(tiny, answers, backend, monkeypatch):
    if backend == "reference":
        monkeypatch.setenv("FLEXJUDGE_BACKEND", "reference")
    engine = Engine.from_pretrained(tiny[0], kv_cache_memory="256MiB")
    for turn in ("cold", "warm"):
        found = engine.generate(list(CASES.values()), GREEDY)
        assert [list(c.token_ids) for c in found] == [tokens for _, tokens in answers.values()], turn
    engine.check_integrity()


@pytest.mark.parametrize("chunk", [1, 7, 50])
def test_chunks_inside_media(tiny, answers, chunk):
    engine = Engine.from_pretrained(
        tiny[0], kv_cache_memory="64MiB", max_batched_tokens=chunk, max_num_seqs=4
    )
    names = ("odd lengths", "everything")
    found = engine.generate([CASES[name] for name in names], GREEDY)
    assert [list(c.token_ids) for c in found] == [answers[name][1] for name in names]


def heard(engine, frames, seconds, fps, seed=9):
    """A video with sound, and that sound."""
    options = MediaOptions(fps=fps)
    (video,) = engine.read_media([MediaItem("video", clip(frames, 84, 56, seed))], options)
    track = sound(seconds, seed)
    (heard,) = engine.read_media([MediaItem("audio", (track, RATE))], options)
    return replace(video.result(), sound=heard.result()), track


@pytest.mark.parametrize(
    ("frames", "seconds", "fps"),
    [
        *[(6, 3.0, 2.0), (9, 2.5, 1.0), (4, 7.3, 1.0), (12, 1.0, 4.0)],
        *[(12, 1.0, 6.25), (32, 2.0, 1.5), (20, 4.0, 15 / 14)],  # times just short of a whole position
    ],
)
def test_video_that_is_heard(tiny, engine, frames, seconds, fps):
    """Frames and sound in turns: the sound as long as the video, longer, and shorter; and the video alone."""
    both, track = heard(engine, frames, seconds, fps)
    for video, sounds in ((both, [track]), (replace(both, sound=None), [])):
        prompt = engine.encode(user("before", video, "after"))
        logits, tokens = tiny[1].answer(prompt, sounds=sounds)
        assert (engine.logits(prompt) - logits).abs().max() < 1e-4
        assert list(engine.generate([prompt], GREEDY)[0].token_ids) == tokens


@pytest.fixture(scope="module")
def company(tiny, engine):
    """Prompts of heard videos and other media, with the logits and tokens of transformers."""
    one, its = heard(engine, 6, 3.0, 2.0)
    other, others = heard(engine, 8, 1.1, 6.25, seed=10)
    image, short, long = picture(60, 90), sound(0.7, 1), sound(1.234, 2)
    cases = {
        "among others": (user("a", image, "b", short, "c", one, "d", long, "e"), [short, its, long]),
        "side by side": (user(one, short, other, "end"), [its, short, others]),
        "twice": (user("a", one, "b", one, "c"), [its, its]),
        "its sound alone, too": (user("a", its, "b", one, "c"), [its, its]),
    }
    answers = {}
    for name, (messages, sounds) in cases.items():
        prompt = engine.encode(messages)
        answers[name] = (prompt, *tiny[1].answer(prompt, media_of(messages)[0], sounds))
    return answers


def test_heard_videos_in_company(engine, company):
    for name, (prompt, logits, _) in company.items():
        assert (engine.logits(prompt) - logits).abs().max() < 1e-4, name


@pytest.mark.parametrize("limits", [{}, {"max_batched_tokens": 3}, {"max_batched_tokens": 40}])
def test_heard_videos_in_a_batch(tiny, company, limits):
    """Steps that end inside a video, and caches that know it or its sound already."""
    with Engine.from_pretrained(tiny[0], kv_cache_memory="64MiB", max_num_seqs=3, **limits) as engine:
        for turn in ("cold", "warm"):
            found = engine.generate([prompt for prompt, _, _ in company.values()], GREEDY)
            assert [list(c.token_ids) for c in found] == [tokens for _, _, tokens in company.values()], turn
        engine.check_integrity()
        assert engine.stats().num_encoded_media == 7


def test_the_whole_checkpoint(tmp_path):
    """As published: the Thinker under its prefix, beside a talker that is never read."""
    oracle = Oracle(write_omni_checkpoint(tmp_path, whole=True, seed=4))
    messages = CASES["everything"]
    for quantization in (None, "int8"):
        engine = Engine.from_pretrained(tmp_path, kv_cache_memory="64MiB", quantization=quantization)
        prompt = engine.encode(messages)
        logits, tokens = oracle.answer(prompt, *media_of(messages))
        if quantization is None:
            assert (engine.logits(prompt) - logits).abs().max() < 1e-4
            assert list(engine.generate([prompt], GREEDY)[0].token_ids) == tokens
        else:
            assert 1e-4 < (engine.logits(prompt) - logits).abs().max() < 10  # its layers are quantised


@pytest.fixture
def newer(tiny, tmp_path):
    """The folder, and the settings that transformers 5 writes into its processor_config.json."""
    from transformers import WhisperFeatureExtractor

    for path in tiny[0].iterdir():
        if path.name != "preprocessor_config.json":
            (tmp_path / path.name).symlink_to(path)
    sounds = WhisperFeatureExtractor(
        feature_size=128, hop_length=200, n_fft=512, chunk_length=30, return_attention_mask=True
    )
    return tmp_path, {
        "image_processor": PREPROCESSOR,
        "feature_extractor": json.loads(sounds.to_json_string()),
    }


def test_settings_of_newer_checkpoints(newer):
    """What is not the default shows in the frames of a sound; longer ones than asked for are refused."""
    from transformers import WhisperFeatureExtractor

    folder, settings = newer
    (folder / "processor_config.json").write_text(json.dumps(settings))
    samples = sound(1.3)
    wanted = WhisperFeatureExtractor(**settings["feature_extractor"])(
        samples, sampling_rate=RATE, return_attention_mask=True, return_tensors="np"
    )
    count = int(wanted["attention_mask"].sum())
    with Engine.from_pretrained(folder, kv_cache_memory="32MiB") as engine:
        (found,) = engine.read_media([MediaItem("audio", (samples, RATE))], MediaOptions())
        np.testing.assert_allclose(
            found.result().features, wanted["input_features"][0, :, :count], rtol=0, atol=1e-6
        )
        (longer,) = engine.read_media([MediaItem("audio", (sound(31), RATE))], MediaOptions())
        with pytest.raises(MediaError):
            longer.result()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("dither", 0.1, r"^processor_config\.json, feature_extractor: field dither: 0\.1"),
        ("feature_size", 80, "feature_size is 80 in processor_config.json, feature_extractor, 128 in config"),
    ],
)
def test_settings_of_newer_checkpoints_are_checked(newer, field, value, message):
    folder, settings = newer
    settings["feature_extractor"][field] = value
    (folder / "processor_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=message):
        Engine.from_pretrained(folder, kv_cache_memory="32MiB")


def test_same_bits_in_any_company(tiny):
    alone = Engine.from_pretrained(tiny[0], kv_cache_memory="64MiB")
    wanted = alone.logits(CASES["everything"])
    for options in ({}, {"max_batched_tokens": 37}, {"num_threads": 1}):
        engine = Engine.from_pretrained(tiny[0], kv_cache_memory="64MiB", **options)
        names = ("odd lengths", "everything", "several windows")
        params = SamplingParams(max_tokens=1)
        inputs = [EngineInput(engine.encode(CASES[name]), params, all_logits=True) for name in names]
        found = {output.index: output.logits for output in engine.run(inputs)}
        assert torch.equal(found[1], wanted), options
