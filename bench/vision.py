"""Images: encoding at the published tower's size, the memory of many, and images that are judged again."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.ceilings import Ceilings
from bench.engines import MissingError
from bench.rounds import Row
from bench.vision_models import REAL_TOWER, SMALL, InMemory, picture, write_model
from flexjudge_fast import Engine, SamplingParams
from flexjudge_fast.engine.engine import EngineInput
from flexjudge_fast.media.items import MediaItem, MediaOptions
from flexjudge_fast.models.audio_config import AudioConfig
from flexjudge_fast.models.audio_tower import AudioTower
from flexjudge_fast.models.loader import TensorLoader
from flexjudge_fast.models.packed_audio import PackedAudioTower
from flexjudge_fast.ops.backend import has_compiled_ops
from flexjudge_fast.prompts.segments import Prompt

ENCODE, FIRST, AGAIN = "encode 448x448", "first judgement of an image", "second judgement of it"
JOB = "8 images x 6 judgements"
ANSWER_TOKENS = 16
OURS, THEIRS = "ours", "transformers"


def measure_encoding(threads: int, rounds: int) -> list[Row]:
    """The published tower in bfloat16, random weights: GFLOP/s of an image; and the memory that 64 take.

    Memory is that of two layers, which is that of any number.
    """
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "all"
        rows = _encode_in_turns(folder, write_model(folder, REAL_TOWER, torch.bfloat16), threads, rounds)
        folder = Path(work) / "two"
        write_model(folder, replace(REAL_TOWER, eye_layers=2, full=(1,)), torch.bfloat16)
        for count in (1, 64):
            command = [sys.executable, "-m", "bench.vision", str(folder), str(count), str(threads)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            rows.append(Row("vision", f"{OURS}, {count} images", "peak memory", "MB", (float(done.stdout),)))
    return rows


def _encode_in_turns(folder: Path, model: Any, threads: int, rounds: int) -> list[Row]:
    torch.set_num_threads(threads)
    samples: dict[str, list[float]] = {}
    missing: list[Row] = []
    with Engine.from_pretrained(folder, num_threads=threads, kv_cache_memory="64MiB") as engine:
        tower = engine._parts.runner.encoder.vision.tower  # type: ignore[union-attr]
        patches, grid = _patches(engine), (1, 32, 32)
        work = _operations() / 1e9
        ways: dict[str, Callable[[], Any]] = {
            f"{OURS}, bf16": partial(tower.encode, patches, [grid]),
            f"{THEIRS} bf16": partial(model.model.visual, patches.bfloat16(), grid_thw=torch.tensor([grid])),
        }
        with Ceilings(1 << 28) as ceilings, torch.inference_mode():
            for turn in range(rounds + 1):
                for kind in ("bf16", "fp32"):
                    name = f"ceiling: {kind} GFLOP/s"
                    try:
                        samples.setdefault(name, []).append(ceilings.measure(kind, threads))
                    except MissingError as error:
                        if turn == 0:
                            missing.append(Row("vision", name, ENCODE, missing=str(error)))
                for name, call in ways.items():
                    start = time.perf_counter()
                    call()
                    samples.setdefault(name, []).append(work / (time.perf_counter() - start))
    return [Row("vision", n, ENCODE, "GFLOP/s", tuple(s[1:])) for n, s in samples.items() if s] + missing


def _patches(engine: Engine) -> torch.Tensor:
    (future,) = engine.read_media([MediaItem("image", picture(0))], MediaOptions())
    encoder = engine._parts.runner.encoder
    assert encoder is not None
    return encoder.vision.patches(future.result())


def _operations() -> float:
    """Floating point operations of the products of one image, 1024 patches; attention left out."""
    s = REAL_TOWER
    layer = 4 * s.eye_hidden**2 + 3 * s.eye_hidden * s.eye_inner
    merger = (4 * s.eye_hidden) * (4 * s.eye_hidden + s.hidden)
    return 2.0 * (1024 * (s.eye_layers * layer + 1176 * s.eye_hidden) + 256 * merger)


def peak_memory(folder: Path, count: int, threads: int) -> float:
    """MB of this process at its peak, after `count` different images in one batch, less what loading took."""
    with Engine.from_pretrained(folder, num_threads=threads, kv_cache_memory="64MiB") as engine:
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far was that of loading
        before = _peak_kilobytes()
        messages = [
            [{"role": "user", "content": [{"type": "image", "image": picture(i)}]}] for i in range(count)
        ]
        engine.generate(messages, SamplingParams(temperature=0, max_tokens=1))
        return (_peak_kilobytes() - before) / 1e3


def _peak_kilobytes() -> float:
    """Of this process's memory, since it was last reset."""
    status = Path("/proc/self/status").read_text()
    return float(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def measure_hearing(threads: int, rounds: int) -> list[Row]:
    """The published audio tower in bfloat16, random weights: ten seconds of sound, in seconds."""
    from transformers import Qwen2_5OmniAudioEncoderConfig
    from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniAudioEncoder

    if not has_compiled_ops():
        raise MissingError("the compiled ops are not there")
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    model = Qwen2_5OmniAudioEncoder(Qwen2_5OmniAudioEncoderConfig()).to(torch.bfloat16).eval()
    tensors = {f"audio_tower.{name}": tensor for name, tensor in model.state_dict().items()}
    config = AudioConfig(128, 32, 20, 5120, 1280, 1500, 100, 3584, 0, 0, 0)
    loader = TensorLoader(InMemory(tensors), torch.bfloat16, torch.device("cpu"), merge=False)
    tower = PackedAudioTower(AudioTower(config, loader), threads)
    features = torch.randn(128, 1000)
    ways: dict[str, Callable[[], Any]] = {
        f"{OURS}, bf16": partial(tower.encode, [features]),
        f"{THEIRS} bf16": partial(model, features.bfloat16(), feature_lens=torch.tensor([1000])),
    }
    samples: dict[str, list[float]] = {name: [] for name in ways}
    with torch.inference_mode():
        for _ in range(rounds + 1):
            for name, call in ways.items():
                samples[name].append(_timed(call))
    return [Row("hearing", name, "encode 10 s of sound", "s", tuple(s[1:])) for name, s in samples.items()]


RUBRIC = "Judge whether the picture shows what was asked for. " * 4
QUESTIONS = [
    f"Request number {i}: draw something with the number {i} in it, in its own style." for i in range(6)
]


def measure_judging(threads: int, rounds: int) -> list[Row]:
    """A small random model in float32: an image judged a second time, and six times each of eight."""
    torch.set_num_threads(threads)
    samples: dict[tuple[str, str], list[float]] = {}

    def note(engine: str, task: str, value: float) -> None:
        samples.setdefault((engine, task), []).append(value)

    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        peer = _Transformers(write_model(folder, SMALL, torch.float32))
        for turn in range(rounds + 1):
            with Engine.from_pretrained(folder, num_threads=threads, kv_cache_memory="1GiB") as engine:
                prompts = _prompts(engine, range(turn * 8, turn * 8 + 8))
                for task, prompt in zip((FIRST, AGAIN), prompts[:2], strict=True):
                    note(OURS, task, _first_token(engine, prompt))
                    note(THEIRS, task, _timed(partial(peer.generate, prompt, 1)))
            with Engine.from_pretrained(folder, num_threads=threads, kv_cache_memory="1GiB") as engine:
                seeds = range(turn * 8, turn * 8 + 8)
                note(OURS, JOB, 48 / _timed(lambda: _generate_all(engine, _prompts(engine, seeds))))  # noqa: B023
            some = prompts[:6]  # as many tokens as every other six
            note(THEIRS, JOB, 6 / _timed(lambda: [peer.generate(p, ANSWER_TOKENS) for p in some]))  # noqa: B023
    units = {JOB: "judgements/s", FIRST: "ms to the first token", AGAIN: "ms to the first token"}
    scale = {JOB: 1.0, FIRST: 1e3, AGAIN: 1e3}
    return [
        Row("vision judge", e, t, units[t], tuple(scale[t] * x for x in s[1:]))
        for (e, t), s in samples.items()
    ]


def _prompts(engine: Engine, seeds: range) -> list[Prompt]:
    """Six questions about each picture, image first."""
    out = []
    for seed in seeds:
        (future,) = engine.read_media([MediaItem("image", picture(seed))], MediaOptions())
        image = future.result()
        for question in QUESTIONS:
            parts = [{"type": "image", "image": image}, {"type": "text", "text": question}]
            out.append(
                engine.encode([{"role": "system", "content": RUBRIC}, {"role": "user", "content": parts}])
            )
    return out


def _generate_all(engine: Engine, prompts: list[Prompt]) -> None:
    params = SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS, ignore_eos=True)
    assert all(output.error is None for output in engine.run([EngineInput(p, params) for p in prompts]))


def _first_token(engine: Engine, prompt: Prompt) -> float:
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    return _timed(lambda: list(engine.run([EngineInput(prompt, params)])))


def _timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class _Transformers:
    """Every judgement is a pass of its own, image and all."""

    def __init__(self, model: Any) -> None:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        self._model = model
        self._processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 3136, "longest_edge": 12845056})

    @torch.inference_mode()
    def generate(self, prompt: Prompt, count: int) -> None:
        from PIL import Image

        ids = torch.tensor([prompt.token_ids])
        pixels = self._processor(
            [Image.fromarray(run.media.frames[0]) for run in prompt.media], return_tensors="pt"
        )
        given = {**pixels, "mm_token_type_ids": (ids == 262).int(), "input_ids": ids}
        out = self._model(**given, use_cache=True, logits_to_keep=1)
        for _ in range(count - 1):
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            out = self._model(
                input_ids=token, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1
            )


if __name__ == "__main__":
    with suppress(BrokenPipeError):
        print(peak_memory(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
