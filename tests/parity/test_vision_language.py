"""Qwen2.5-VL: logits and greedy tokens of transformers, however media and steps are mixed and cut."""

import numpy as np
import pytest
import torch
from PIL import Image

from flexjudge_fast import Engine, SamplingParams
from flexjudge_fast.engine.engine import EngineInput
from tests.models import PREPROCESSOR, write_vision_checkpoint

GREEDY = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
IMAGE, VIDEO = 262, 263


def picture(width, height, seed=0):
    """Smooth noise: neighbouring pixels alike, no two pictures alike."""
    rng = np.random.default_rng([seed, width, height])
    coarse = rng.integers(0, 256, (max(height // 9, 1), max(width // 9, 1), 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height))


def clip(count, width, height, seed=0):
    return [np.asarray(picture(width, height, seed * 100 + i)) for i in range(count)]


def user(*parts):
    """Messages of one turn: strings, PIL images, lists of frames."""
    content = []
    for part in parts:
        kind = "text" if isinstance(part, str) else "video" if isinstance(part, list) else "image"
        content.append({"type": kind, kind: part})
    return [{"role": "system", "content": "Judge."}, {"role": "user", "content": content}]


def video_patches(frames):
    """What transformers' video processor makes of resized frames [n, height, width, 3], from its formula."""
    frames = torch.from_numpy(frames).permute(0, 3, 1, 2).double() / 255
    mean, std = (torch.tensor(PREPROCESSOR[name]).double() for name in ("image_mean", "image_std"))
    frames = (frames - mean[:, None, None]) / std[:, None, None]
    if len(frames) % 2:
        frames = torch.cat((frames, frames[-1:]))
    time, height, width = len(frames) // 2, frames.shape[2] // 14, frames.shape[3] // 14
    patches = frames.view(time, 2, 3, height // 2, 2, 14, width // 2, 2, 14)
    return patches.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(time * height * width, -1).float()


def positions(prompt, merge=2, speed=2):
    """M-RoPE token by token, as in the training: what follows a medium begins behind all its positions."""
    rows, following, at = [], 0, 0
    for run in prompt.media:
        while at < run.start:
            rows.append([following] * 3)
            following, at = following + 1, at + 1
        time, height, width = run.media.grid
        step = speed * run.media.seconds_per_grid if run.media.kind == "video" else 1
        for t in range(time):
            for y in range(height // merge):
                rows += [
                    [following + int(t * step), following + y, following + x] for x in range(width // merge)
                ]
        at, following = run.end, max(max(row) for row in rows) + 1
    rows += [[following + i] * 3 for i in range(len(prompt) - at)]
    return torch.tensor(rows).T[:, None]  # [3, 1, num_tokens]


class Oracle:
    """transformers' answer to a prompt; images go through its own processor."""

    def __init__(self, model):
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        self.model = model
        size = {"shortest_edge": PREPROCESSOR["min_pixels"], "longest_edge": PREPROCESSOR["max_pixels"]}
        self.processor = Qwen2VLImageProcessorPil(size=size)

    def inputs(self, prompt, images):
        ids = torch.tensor([prompt.token_ids])
        given = {"input_ids": ids, "position_ids": positions(prompt)}
        if images:
            given |= self.processor(images, return_tensors="pt")
        videos = [run.media for run in prompt.media if run.media.kind == "video"]
        if videos:
            given["pixel_values_videos"] = torch.cat([video_patches(media.frames) for media in videos])
            given["video_grid_thw"] = torch.tensor([media.grid for media in videos])
        return given

    def answer(self, prompt, images, count=32):
        """Logits of the prompt [num_tokens, vocab] and `count` greedy tokens."""
        given = self.inputs(prompt, images)
        following = int(given["position_ids"].max()) + 1
        with torch.inference_mode():
            out = self.model(**given, use_cache=True)
            logits, tokens = out.logits[0], [int(out.logits[0, -1].argmax())]
            for i in range(count - 1):
                step = {
                    "input_ids": torch.tensor([[tokens[-1]]]),
                    "position_ids": torch.full((3, 1, 1), following + i),
                }
                out = self.model(**step, past_key_values=out.past_key_values, use_cache=True)
                tokens.append(int(out.logits[0, -1].argmax()))
        return logits, tokens


def images_of(messages):
    parts = messages[1]["content"]
    return [part["image"] for part in parts if part["type"] == "image"]


CASES = {
    "one image": user("What is this? ", picture(140, 100), "Say."),
    "several sizes": user(picture(60, 200), "and", picture(224, 224), picture(84, 56), "which?"),
    "tiny": user(picture(28, 28), "?"),
    "one pixel": user(picture(1, 1), "?"),
    "wide": user(picture(1400, 28), "a line"),
    "tall": user(picture(30, 900), "a column"),
    "windows": user(picture(500, 620), "more than sixteen windows"),
    "ragged windows": user(picture(28 * 5, 28 * 9), "edges"),
    "video": user("A clip: ", clip(4, 112, 84)),
    "odd frames": user(clip(7, 84, 112), "seven frames"),
    "one frame": user(clip(1, 84, 84), "a still"),
    "mixed": user("first", picture(100, 90), "then", clip(5, 70, 98), "between", picture(56, 112, 1), "end"),
    "text": user("no picture at all"),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vision")
    return folder, Oracle(write_vision_checkpoint(folder))


@pytest.fixture(scope="module")
def engine(tiny):
    return Engine.from_pretrained(tiny[0], kv_cache_memory="256MiB")


@pytest.fixture(scope="module")
def answers(tiny, engine):
    """Of all cases, from transformers."""
    prompts = {name: engine.encode(messages) for name, messages in CASES.items()}
    return {name: tiny[1].answer(p, images_of(CASES[name])) for name, p in prompts.items()}


@pytest.mark.parametrize("name", CASES)
def test_logits_and_greedy(engine, answers, name):
    logits, tokens = answers[name]
    assert (engine.logits(CASES[name]) - logits).abs().max() < 1e-4
    assert list(engine.generate([CASES[name]], GREEDY)[0].token_ids) == tokens


@pytest.mark.parametrize("backend", ["compiled", "reference"])
def test_batch_cold_and_warm(tiny, answers, backend, monkeypatch):
    """All requests side by side, then again from the caches."""
    if backend == "reference":
        monkeypatch.setenv("FLEXJUDGE_BACKEND", "reference")
    engine = Engine.from_pretrained(tiny[0], kv_cache_memory="256MiB")
    wanted = [tokens for _, tokens in answers.values()]
    for turn in ("cold", "warm"):
        found = engine.generate(list(CASES.values()), GREEDY)
        assert [list(c.token_ids) for c in found] == wanted, turn
        assert all(c.num_cached_tokens == len(c.prompt_token_ids) - 1 for c in found) == (turn == "warm")
    engine.check_integrity()


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 16, 61])
def test_chunks_inside_media(tiny, answers, chunk):
    engine = Engine.from_pretrained(
        tiny[0], kv_cache_memory="64MiB", max_batched_tokens=chunk, max_num_seqs=4
    )
    names = ("mixed", "odd frames", "several sizes")
    found = engine.generate([CASES[name] for name in names], GREEDY)
    assert [list(c.token_ids) for c in found] == [answers[name][1] for name in names]


def test_after_preemption(tiny, answers):
    names = ("several sizes", "mixed", "video", "odd frames", "windows")
    token_bytes = 2 * 3 * 2 * 16 * 4
    longest = max(len(answers[name][0]) for name in names) + 32 + 40
    engine = Engine.from_pretrained(
        tiny[0], kv_cache_memory=longest * token_bytes, encoder_cache_memory="4KiB"
    )
    found = engine.generate([CASES[name] for name in names], GREEDY)
    assert [list(c.token_ids) for c in found] == [answers[name][1] for name in names]
    assert engine.stats().num_preemptions > 0
    engine.check_integrity()


def test_small_encoder_batches(tiny, answers):
    engine = Engine.from_pretrained(tiny[0], kv_cache_memory="64MiB", max_encoder_patches=1)
    assert list(engine.generate([CASES["mixed"]], GREEDY)[0].token_ids) == answers["mixed"][1]


@pytest.mark.parametrize(
    "options",
    [{"tied": True}, {"shard": "40KB"}, {"new_names": True}, {"fullatt_block_indexes": []}],
    ids=["tied", "sharded", "new names", "windows only"],
)
def test_layouts(tmp_path, options):
    oracle = Oracle(write_vision_checkpoint(tmp_path, seed=3, **options))
    engine = Engine.from_pretrained(tmp_path, kv_cache_memory="64MiB")
    logits, tokens = oracle.answer(engine.encode(CASES["mixed"]), images_of(CASES["mixed"]))
    assert (engine.logits(CASES["mixed"]) - logits).abs().max() < 1e-4
    assert list(engine.generate([CASES["mixed"]], GREEDY)[0].token_ids) == tokens


def test_the_example_checkpoint(tmp_path):
    """What `examples/make_tiny_vl.py` writes is what transformers reads."""
    import runpy
    from pathlib import Path

    from transformers import Qwen2_5_VLForConditionalGeneration

    script = Path(__file__).parents[2] / "examples" / "make_tiny_vl.py"
    runpy.run_path(str(script))["write"](tmp_path)
    oracle = Oracle(Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path).eval())
    engine = Engine.from_pretrained(tmp_path, kv_cache_memory="64MiB")
    logits, _ = oracle.answer(engine.encode(CASES["mixed"]), images_of(CASES["mixed"]), 1)
    assert (engine.logits(CASES["mixed"]) - logits).abs().max() < 1e-4


def test_a_head_of_80_and_many_layers(tmp_path):
    """The published head size, and full attention in some of more layers."""
    wide = {"depth": 6, "hidden_size": 160, "fullatt_block_indexes": [2, 5]}
    oracle = Oracle(write_vision_checkpoint(tmp_path, **wide))
    engine = Engine.from_pretrained(tmp_path, kv_cache_memory="64MiB")
    logits, _ = oracle.answer(engine.encode(CASES["mixed"]), images_of(CASES["mixed"]), 1)
    assert (engine.logits(CASES["mixed"]) - logits).abs().max() < 1e-4


@pytest.mark.parametrize("fps", [0.5, 1.0, 3.0, 24.0])
def test_frames_per_second(engine, tiny, fps):
    from flexjudge_fast.media.items import MediaItem, MediaOptions

    (future,) = engine.read_media([MediaItem("video", clip(6, 84, 56))], MediaOptions(fps=fps))
    messages = user("When? ", "", "now")
    messages[1]["content"][1] = {"type": "video", "video": future.result()}
    prompt = engine.encode(messages)
    logits, tokens = tiny[1].answer(prompt, [])
    assert (engine.logits(prompt) - logits).abs().max() < 1e-4
    assert list(engine.generate([prompt], GREEDY)[0].token_ids) == tokens


def test_positions_are_those_of_transformers(engine, tiny):
    """Where no video lasts longer than it is wide: there transformers 5.23 agrees with the training."""
    for name in ("one image", "several sizes", "wide", "mixed", "one frame", "text"):
        prompt = engine.encode(CASES[name])
        ids = torch.tensor([prompt.token_ids])
        kinds = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
        grids = {
            kind: [run.media.grid for run in prompt.media if run.media.kind == kind]
            for kind in ("image", "video")
        }
        steps = [run.media.seconds_per_grid for run in prompt.media if run.media.kind == "video"]
        if steps and max(steps) * 2 * 3 >= 2:
            continue
        given = {f"{kind}_grid_thw": torch.tensor(found) for kind, found in grids.items() if found}
        theirs, _ = tiny[1].model.model.get_rope_index(ids, kinds, **given, second_per_grid_ts=steps or None)
        assert torch.equal(theirs, positions(prompt))


def test_bfloat16(tmp_path):
    model = write_vision_checkpoint(tmp_path)
    engine = Engine.from_pretrained(tmp_path, dtype="bfloat16", kv_cache_memory="64MiB")
    oracle = Oracle(model.to(torch.bfloat16).float())  # the same rounded weights
    total = []
    for name in ("one image", "several sizes", "mixed"):
        logits, _ = oracle.answer(engine.encode(CASES[name]), images_of(CASES[name]), 1)
        wanted, found = logits.log_softmax(-1), engine.logits(CASES[name]).log_softmax(-1)
        total.append((wanted.exp() * (wanted - found)).sum(-1))
    assert torch.cat(total).mean() < 1e-3


def test_same_bits_in_any_company(tiny):
    """Logits of a request with media: alone, beside others, encoded together, cut in chunks."""
    alone = Engine.from_pretrained(tiny[0], kv_cache_memory="64MiB")
    wanted = alone.logits(CASES["mixed"])
    for options in ({}, {"max_batched_tokens": 37}, {"num_threads": 1}):
        engine = Engine.from_pretrained(tiny[0], kv_cache_memory="64MiB", **options)
        names = ("several sizes", "video", "mixed", "windows")
        inputs = [
            EngineInput(engine.encode(CASES[n]), SamplingParams(max_tokens=1), all_logits=True) for n in names
        ]
        found = {output.index: output.logits for output in engine.run(inputs)}
        assert torch.equal(found[2], wanted), options
