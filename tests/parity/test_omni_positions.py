"""Qwen2.5-Omni: where media stand in a prompt and in time, against transformers' own rules; no model runs."""

import random
from dataclasses import replace
from types import MethodType, SimpleNamespace

import numpy as np
import pytest
import torch

from flexjudge_fast.engine.media_input import MediaInput
from flexjudge_fast.media.audio_processor import AudioProcessor
from flexjudge_fast.media.prepared import PreparedAudio, PreparedMedia
from flexjudge_fast.models.audio_config import AudioConfig
from flexjudge_fast.models.mrope import mrope_positions
from flexjudge_fast.models.vision_config import VisionConfig

VISION = VisionConfig(1, 8, 8, 1, 8, 14, 2, 2, 112, frozenset(), 25.0, 2.0, 262, 263, 259, 260)
AUDIO = AudioConfig(128, 1, 1, 8, 8, 1500, 100, 8, 264, 265, 266)
INPUT = MediaInput(VISION, AUDIO)
RATES = [i / 100 for i in range(20, 3001)] + [15 / 14, 30000 / 1001, 24000 / 1001]
TEXT = 1


def heard(num_frames):
    tokens = AudioProcessor().num_tokens(num_frames)
    return PreparedAudio("audio", b"", np.zeros((1, num_frames), np.float32), tokens, num_frames / 100)


def seen(grid, seconds=0.0, sound=None):
    """An image, or a video with `seconds` between its steps; `grid` counts embeddings."""
    time, height, width = grid
    nothing = np.zeros((1, 1, 1, 3), np.uint8)
    kind = "video" if seconds else "image"
    patches = (time, 2 * height, 2 * width)
    return PreparedMedia(kind, b"", nothing, patches, time * height * width, seconds, sound)


def laid_out(parts):
    """Ids and positions of a prompt of media and, as numbers, so many tokens of text."""
    ids, spans = [], []
    for part in parts:
        if isinstance(part, int):
            ids += [TEXT] * part
            continue
        placeholder = INPUT.placeholder(part)
        spans.append(replace(placeholder.span, start=len(ids)))
        ids += placeholder.token_ids
    return ids, mrope_positions(len(ids), spans)


@pytest.fixture(scope="module")
def rope():
    """transformers' `get_rope_index`, on the same prompts."""
    from transformers import Qwen2_5OmniThinkerConfig
    from transformers.models.qwen2_5_omni import modeling_qwen2_5_omni as omni

    source = omni.Qwen2_5OmniPreTrainedModelForConditionalGeneration
    names = {"image_token_index": 262, "video_token_index": 263, "audio_token_index": 264}
    names |= {"vision_start_token_id": 259, "vision_end_token_id": 260}
    names |= {"audio_start_token_id": 265, "audio_end_token_id": 266}
    model = SimpleNamespace(spatial_merge_size=2, config=Qwen2_5OmniThinkerConfig(**names))
    for name in ("get_llm_pos_ids_for_vision", "get_chunked_index"):
        setattr(model, name, MethodType(getattr(source, name), model))

    def positions(ids, parts):
        media = [part for part in parts if not isinstance(part, int)]
        images = [m.grid for m in media if m.kind == "image"]
        videos = [m for m in media if m.kind == "video"]
        sounds = [getattr(m, "sound", None) or m for m in media]
        frames = [s.features.shape[1] for s in sounds if s.kind == "audio"]
        given = torch.tensor([ids])
        found, _ = source.get_rope_index(
            model,
            given,
            torch.tensor(images) if images else None,
            torch.tensor([m.grid for m in videos]) if videos else None,
            torch.ones_like(given),
            any(m.sound for m in videos),
            torch.tensor(frames) if frames else None,
            torch.tensor([m.seconds_per_grid for m in videos]) if videos else None,
        )
        return found[:, 0].numpy()

    return positions


def test_positions_at_many_rates(rope):
    """Twenty videos a prompt, one embedding a step: a time is a whole number, or just short of one."""
    for first in range(0, len(RATES), 20):
        parts = [3]
        for fps in RATES[first : first + 20]:
            parts += [seen((40, 1, 1), 2 / fps), 1]
        ids, positions = laid_out(parts)
        assert np.array_equal(positions, rope(ids, parts)), RATES[first : first + 20]


def any_media(rng, with_sound):
    """One to five media with text between them; with sound, every video is heard."""
    parts = []
    for _ in range(rng.randint(1, 5)):
        kind = rng.choice(["image", "video", "audio"])
        sound = heard(rng.choice([3, 4, 5, 199, 200, 201, rng.randint(3, 1500)]))
        size = (rng.randint(1, 5), rng.randint(1, 5))
        if kind == "image":
            medium = seen((1, *size))
        elif kind == "video":
            seconds = rng.choice([1.0, 0.32, 4.0, 2 / rng.uniform(0.5, 30), rng.uniform(0.05, 5)])
            medium = seen((rng.randint(1, 12), *size), seconds, sound if with_sound else None)
        else:
            medium = sound
        parts += [rng.randint(1, 4), medium]
    return [*parts, rng.randint(1, 3), seen((1, 1, 1)), rng.randint(0, 3)]


@pytest.mark.parametrize("with_sound", [False, True])
def test_positions_of_mixed_media(rope, with_sound):
    rng = random.Random(int(with_sound))
    for _ in range(300):
        parts = any_media(rng, with_sound)
        ids, positions = laid_out(parts)
        assert np.array_equal(positions, rope(ids, parts)), parts


def test_turns_of_frames_and_sound():
    """The tokens of a video that is heard are those of transformers' processor."""
    from transformers.models.qwen2_5_omni.processing_qwen2_5_omni import Qwen2_5OmniProcessor as Processor

    names = {"audio_bos_token": "[", "audio_eos_token": "]", "video_token": "v", "audio_token": "a"}
    processor = SimpleNamespace(**names, video_processor=SimpleNamespace(merge_size=2))
    processor.get_chunked_index = MethodType(Processor.get_chunked_index, processor)
    letters = {259: "", 260: "", 263: "v", 264: "a", 265: "[", 266: "]"}
    rng = random.Random(2)
    for fps in [*RATES[::3], 6.25, 1.5, 15 / 14]:
        grid = (rng.randint(1, 40), rng.randint(1, 3), rng.randint(1, 3))
        medium = seen(grid, 2 / fps, heard(rng.randint(3, 3000)))
        wanted = Processor.replace_video_with_audio_token(
            processor,
            {"video_grid_thw": np.array([medium.grid]), "video_second_per_grid": [medium.seconds_per_grid]},
            0,
            {"num_audio_tokens": np.array([medium.sound.num_tokens])},
            0,
            position_id_per_seconds=25,
            seconds_per_chunk=2.0,
        )
        assert "".join(letters[i] for i in INPUT.placeholder(medium).token_ids) == wanted, (fps, grid)
