"""Puts a GPU's runner together: measures what a step needs, sizes the KV cache, picks the attention."""

from dataclasses import dataclass
from importlib.util import find_spec
from math import isqrt
from pathlib import Path

import torch

from flexjudge_fast.engine.attention_plans import AttentionPlanner, make_planner
from flexjudge_fast.engine.batch import Batch, Chunk
from flexjudge_fast.engine.config import EngineConfig, num_blocks_of, parse_bytes
from flexjudge_fast.engine.device import CudaDevice
from flexjudge_fast.engine.encoder_runner import EncoderRunner
from flexjudge_fast.engine.gpu_memory import GpuMemory, graph_bytes, peak_bytes
from flexjudge_fast.engine.gpu_runner import GpuRunner
from flexjudge_fast.engine.graph_ladder import GraphLadder
from flexjudge_fast.engine.input_buffers import InputBuffers
from flexjudge_fast.engine.model_runner import kv_bytes_per_token
from flexjudge_fast.engine.request import Request
from flexjudge_fast.engine.sampling_params import SamplingParams
from flexjudge_fast.errors import InvalidArgumentError
from flexjudge_fast.models.decoder import Decoder
from flexjudge_fast.ops.backend import use_kernel_bundle
from flexjudge_fast.prompts.grammar import Probe

_FRACTION = 0.9  # of what no step needs


class _NoText:
    def token_bytes(self, token_id: int) -> bytes:
        return b""


@dataclass(frozen=True)
class GpuParts:
    """What every runner on this GPU has in common."""

    model: Decoder
    kv_dtype: torch.dtype
    config: EngineConfig
    max_len: int
    device: torch.device
    planner: AttentionPlanner
    encoder: EncoderRunner | None

    @property
    def max_blocks(self) -> int:
        return -(-self.max_len // self.config.block_size) + 1

    @property
    def ladder(self) -> GraphLadder | None:
        """Sizes of recorded steps, if there are any."""
        if not (self.config.cuda_graphs and self.planner.records):
            return None
        return GraphLadder(self.config.max_num_seqs, self.max_blocks)

    def runner(self, num_blocks: int, ladder: GraphLadder | None) -> GpuRunner:
        config, decoder = self.config, self.model.config

        def buffers() -> InputBuffers:
            return InputBuffers(
                config.max_batched_tokens,
                config.max_num_seqs,
                self.max_blocks,
                config.block_size,
                torch.device("cpu"),  # pinned; the runner copies
                num_sections=len(decoder.rope.sections) or 1,
                vocab_size=decoder.vocab_size,
                pin=True,
            )

        return GpuRunner(
            self.model,
            self.kv_dtype,
            num_blocks,
            config.block_size,
            buffers,
            config.max_batched_tokens,
            CudaDevice(self.device),
            self.planner,
            self.encoder,
            ladder,
        )


def make_gpu_runner(
    model: Decoder,
    kv_dtype: torch.dtype,
    config: EngineConfig,
    max_len: int,
    device: torch.device,
    encoder: EncoderRunner | None,
) -> tuple[GpuRunner, int]:
    """The runner, and how many KV blocks it has.

    Raises:
        InvalidArgumentError: memory or attention backend do not allow it.
        KernelBundleError: `kernel_bundle` is not for this GPU, or this version.
    """
    if find_spec("triton") is None:
        raise InvalidArgumentError("device='cuda': the package triton is missing; `pip install triton`")
    if config.kernel_bundle is not None:
        use_kernel_bundle(Path(config.kernel_bundle))
    planner = make_planner(config.attention_backend, model.config, model.dtype, kv_dtype, config.block_size)
    parts = GpuParts(model, kv_dtype, config, max_len, device, planner, encoder)
    ladder = parts.ladder
    if config.kv_cache_memory is not None:
        budget = parse_bytes("kv_cache_memory", config.kv_cache_memory)
    else:
        graphs = 0 if ladder is None else graph_bytes(ladder, model.config.vocab_size)
        step, encoding = _step_peak(parts), _encoder_peak(parts)
        free, total = torch.cuda.mem_get_info(device)
        memory = GpuMemory(total, free, step, encoding, graphs)
        budget = memory.kv_cache(config.kv_cache_fraction or _FRACTION)
    block_bytes = config.block_size * kv_bytes_per_token(model.config, kv_dtype)
    num_blocks = num_blocks_of(config, budget, block_bytes, max_len)
    return parts.runner(num_blocks, ladder), num_blocks


def _step_peak(parts: GpuParts) -> int:
    """Of a step of `max_batched_tokens` tokens of one prompt, with as many rows of logits as sequences; as
    many of the step before may still be read."""
    count = min(parts.config.max_batched_tokens, parts.max_len - 1)
    blocks = -(-count // parts.config.block_size) + 1
    runner = parts.runner(blocks, ladder=None)
    request = Request(0, (0,) * count, SamplingParams(max_tokens=1), _NoText(), frozenset(), parts.max_len)
    request.block_table = list(range(blocks))
    request.probe = Probe(0, (0,) * min(count, parts.config.max_num_seqs))
    before = 4 * parts.config.max_num_seqs * parts.model.config.vocab_size
    return before + peak_bytes(lambda: runner.run(Batch((Chunk(request, 0, count),), ())), parts.device)


def _encoder_peak(parts: GpuParts) -> int:
    """Of a pass of the vision tower over `max_encoder_patches` patches of one picture."""
    if parts.encoder is None or parts.encoder.vision is None:  # molecules bound their own memory
        return 0
    tower = parts.encoder.vision.tower
    side = isqrt(parts.config.max_encoder_patches) // 2 * 2
    patches = torch.zeros(side * side, tower.config.patch_elements)
    return peak_bytes(lambda: tower.encode(patches, [(1, side, side)]), parts.device)
