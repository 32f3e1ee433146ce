"""`python bench/gpu_host.py`: the judge's work where only the host's part is real, on a machine with no GPU.

The engine schedules, fills inputs, decides about answers and hands out results as on a GPU. The device behind
it is a clock: a step takes a fixed time after the one before it, and launching one kernel by kernel keeps the
host busy. So this shows how much of the host's work the device waits for.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from bench.pairs import RUBRIC, make_pairs, seconds_to_judge  # noqa: E402
from flexjudge_fast import Engine, Judgement  # noqa: E402
from flexjudge_fast.engine import gpu_runner  # noqa: E402
from flexjudge_fast.engine.attention_plans import NoPlanner  # noqa: E402
from flexjudge_fast.engine.config import EngineConfig  # noqa: E402
from flexjudge_fast.engine.device import Event, Graph, Tensors  # noqa: E402
from flexjudge_fast.engine.graph_ladder import GraphLadder  # noqa: E402
from flexjudge_fast.engine.input_buffers import InputBuffers  # noqa: E402
from flexjudge_fast.engine.scheduler import Scheduler  # noqa: E402
from flexjudge_fast.engine.setup import load_parts  # noqa: E402
from flexjudge_fast.layers.attention import AttentionInput  # noqa: E402
from flexjudge_fast.models.config import DecoderConfig  # noqa: E402
from tests.models import write_checkpoint  # noqa: E402

MAX_LEN, BLOCK, MAX_TOKENS, NUM_BLOCKS = 4096, 16, 2048, 20000
LETTERS = (97, 122)  # what is drawn: bytes of a tokenizer that knows nothing else


@dataclass(frozen=True)
class Costs:
    """Seconds: of the device for a step and for a token of one that is not recorded; of the host to launch
    a step kernel by kernel, and to replay one."""

    step: float
    token: float
    launch: float
    replay: float


class ClockDevice:
    """Does work at once, and says that it is done when a device would have done it."""

    torch_device = torch.device("cpu")

    def __init__(self, costs: Costs) -> None:
        self.costs = costs
        self.busy = 0.0  # seconds
        self._free_at = 0.0

    def active(self) -> AbstractContextManager[object]:
        return nullcontext()

    def beside(self) -> AbstractContextManager[object]:
        return nullcontext()

    def submit(self, work: Callable[[], None]) -> None:
        work()

    def take(self, seconds: float, host: float) -> None:
        """Queue a step of so many seconds, whose launch keeps the host busy for `host`."""
        ready = time.perf_counter() + host
        while time.perf_counter() < ready:
            pass
        self._free_at = max(self._free_at, time.perf_counter()) + seconds
        self.busy += seconds

    def record(self) -> Event:
        return _At(self._free_at)

    def capture(self, work: Callable[[], Tensors]) -> tuple[Graph, Tensors]:
        return _Replay(self), work()


@dataclass(frozen=True)
class _At:
    when: float

    def wait(self) -> None:
        time.sleep(max(0.0, self.when - time.perf_counter()))


@dataclass(frozen=True)
class _Replay:
    device: ClockDevice

    def replay(self) -> None:
        self.device.take(self.device.costs.step, self.device.costs.replay)


class ClockModel:
    """Random logits, of which the host reads some, after the time that a step takes."""

    dtype = torch.float32

    def __init__(self, config: DecoderConfig, device: ClockDevice) -> None:
        self.config = config
        self._device = device
        self._logits = torch.randn(MAX_TOKENS, config.vocab_size, generator=torch.Generator().manual_seed(0))

    def step(
        self,
        token_ids: torch.Tensor,
        inputs: AttentionInput,
        cache: torch.Tensor,
        logit_rows: torch.Tensor,
        out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows = self._logits[: len(logit_rows)]
        if out is None:
            costs = self._device.costs
            self._device.take(costs.step + costs.token * len(token_ids), costs.launch)
        rows = rows.clone() if out is None else out.copy_(rows)
        return rows, torch.ones(len(rows), dtype=torch.bool)


def measure(folder: Path, costs: Costs, num_pairs: int, num_seqs: int) -> dict[str, float]:
    """The judge's work of `bench/gpu.py`: pairs, both orders, four votes, 60 to 127 tokens of reasoning."""
    config = EngineConfig(max_model_len=MAX_LEN, max_num_seqs=num_seqs, kv_cache_memory=1 << 22)
    parts = load_parts(folder, "cpu", "float32", None, (), config)
    decoder, width, device = parts.runner.model.config, MAX_LEN // BLOCK + 1, ClockDevice(costs)
    sizes = (MAX_TOKENS, num_seqs, width, BLOCK, device.torch_device, 1, decoder.vocab_size)
    runner = gpu_runner.GpuRunner(
        ClockModel(decoder, device),  # type: ignore[arg-type]
        torch.float32,
        NUM_BLOCKS,
        BLOCK,
        lambda: InputBuffers(*sizes),
        MAX_TOKENS,
        device,
        NoPlanner(),
        ladder=GraphLadder(num_seqs, width),
    )
    engine = Engine(replace(parts, runner=runner, scheduler=Scheduler(parts.scheduler.limits, NUM_BLOCKS)))
    items = [
        Judgement("pair", q, a, rubric=RUBRIC, votes=4, order="both", max_think_tokens=60 + 31 * i % 68)
        for i, (q, a) in enumerate(make_pairs(num_pairs))
    ]
    generator = torch.Generator().manual_seed(1)

    def draw(logits: torch.Tensor, draws: list[object], *_: object) -> torch.Tensor:
        return torch.randint(*LETTERS, (len(draws),), generator=generator)

    with mock.patch.object(gpu_runner, "sample_on_device", draw):  # on a GPU a launch or two
        seconds = seconds_to_judge(engine, items)
    tokens = engine.stats().num_forward_tokens
    return {
        "pairs/s": num_pairs / seconds,
        "tokens/s": tokens / seconds,
        "device busy, %": 100 * device.busy / seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--seqs", type=int, default=64, help="sequences at once")
    parser.add_argument("--step", type=float, default=6.8, help="ms of the device for a step")
    parser.add_argument("--token", type=float, default=0.008, help="ms more for a token, where not recorded")
    parser.add_argument("--launch", type=float, default=4.0, help="ms of the host for a step not recorded")
    parser.add_argument("--replay", type=float, default=0.4, help="ms of the host for a recorded step")
    chosen = parser.parse_args()
    costs = Costs(*(x / 1e3 for x in (chosen.step, chosen.token, chosen.launch, chosen.replay)))
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder))
        for name, value in measure(Path(folder), costs, chosen.pairs, chosen.seqs).items():
            print(f"{name:>16} {value:9.1f}")


if __name__ == "__main__":
    main()
