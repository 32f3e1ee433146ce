"""Puts an engine together: checkpoint, tokenizer, model, KV cache, scheduler."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from flexjudge_fast.engine.config import (
    KV_CACHE_DTYPES,
    EngineConfig,
    num_kv_blocks,
    pick_device,
    pick_dtype,
)
from flexjudge_fast.engine.device import on_device
from flexjudge_fast.engine.encoder_runner import EncoderRunner
from flexjudge_fast.engine.gpu_setup import make_gpu_runner
from flexjudge_fast.engine.input_buffers import InputBuffers
from flexjudge_fast.engine.media_setup import load_media
from flexjudge_fast.engine.model_runner import ModelRunner, kv_bytes_per_token
from flexjudge_fast.engine.prompts import PromptEncoder
from flexjudge_fast.engine.scheduler import Scheduler, SchedulerLimits
from flexjudge_fast.errors import CheckpointError, InvalidArgumentError
from flexjudge_fast.models.config import DecoderConfig, model_config, read_decoder_config
from flexjudge_fast.models.decoder import Decoder
from flexjudge_fast.models.mol_llama import MolLlamaCheckpoint
from flexjudge_fast.models.packed import PackedModel
from flexjudge_fast.models.registry import load_model, open_model
from flexjudge_fast.ops.backend import isa, uses_triton
from flexjudge_fast.prompts.chat_template import ChatTemplate
from flexjudge_fast.prompts.mol_llama_template import MolLlamaTemplate
from flexjudge_fast.prompts.tokenizer import Tokenizer
from flexjudge_fast.weights.checkpoint import Checkpoint
from flexjudge_fast.weights.quantization import (
    GPU_QUANTIZATIONS,
    QUANTIZATIONS,
    ActivationQuantization,
    Quantization,
    find_activation_quantization,
    find_quantization,
)


@dataclass(frozen=True)
class EngineParts:
    """Everything an `Engine` is made of."""

    checkpoint: Checkpoint
    tokenizer: Tokenizer
    prompts: PromptEncoder
    eos_ids: frozenset[int]
    masked_ids: tuple[int, ...]  # that are never generated
    max_model_len: int
    arithmetic: str  # what bits depend on beside weights and dtype
    scheduler: Scheduler
    runner: ModelRunner


def load_parts(
    model: str | Path,
    device: str | torch.device,
    dtype: str | torch.dtype,
    quantization: str | None,
    ignore_config: Sequence[str],
    config: EngineConfig,
    judge_backbone: str | Path | None = None,
    base_llm: str | Path | None = None,
) -> EngineParts:
    """Load a checkpoint and size everything around it."""
    where = pick_device(device)
    with on_device(where):  # kernels ask the current device what it can do
        scheme = _quantization(quantization, where)
        checkpoint = open_model(model, judge_backbone, base_llm, ignore_config)
        run = model_config(checkpoint.config)
        stored = [part.get(name) for part in (checkpoint.config, run) for name in ("dtype", "torch_dtype")]
        picked = pick_dtype(dtype, next(filter(None, stored), None))
        decoder = read_decoder_config(run, ignore_config)
        num_threads = config.num_threads or torch.get_num_threads()
        limit = decoder.max_positions
        max_len = config.max_model_len or limit
        if max_len > limit:
            raise InvalidArgumentError(
                f"max_model_len={config.max_model_len}: the checkpoint's limit is {limit}"
            )
        tokenizer = Tokenizer(checkpoint.tokenizer_json(), checkpoint.tokenizer_config)
        network = load_model(
            checkpoint,
            decoder,
            picked,
            where,
            max_len,
            expand=quantization == "dequantize",
            quantization=scheme,
            activation_bytes=2 if config.activations == "int16" else 1,
            num_threads=num_threads,
        )
        media = load_media(checkpoint, run, decoder, picked, where, config, ignore_config)
        checkpoint.start_hashing()
        kv_dtype = KV_CACHE_DTYPES.get(config.kv_cache_dtype, picked)
        encoder = None if media is None else media.encoder
        runner, num_blocks = _runner(network, kv_dtype, config, max_len, where, encoder)
        limits = SchedulerLimits(
            config.block_size, config.max_batched_tokens, config.max_num_seqs, config.prefix_caching
        )
        return EngineParts(
            checkpoint=checkpoint,
            tokenizer=tokenizer,
            prompts=PromptEncoder(
                tokenizer,
                _chat_template(checkpoint, tokenizer),
                decoder.vocab_size,
                max_len,
                None if media is None else media.input,
                None if media is None else media.reader,
            ),
            eos_ids=_eos_ids(checkpoint, tokenizer),
            masked_ids=checkpoint.masked_token_ids if isinstance(checkpoint, MolLlamaCheckpoint) else (),
            max_model_len=max_len,
            arithmetic=f"{isa(where)}, activations {config.activations}, kv cache {_name(kv_dtype)}",
            scheduler=Scheduler(limits, num_blocks),
            runner=runner,
        )


def _runner(
    network: Decoder | PackedModel,
    kv_dtype: torch.dtype,
    config: EngineConfig,
    max_len: int,
    device: torch.device,
    encoder: EncoderRunner | None,
) -> tuple[ModelRunner, int]:
    """What runs steps, and how many KV blocks it has."""
    if isinstance(network, Decoder) and device.type == "cuda":
        return make_gpu_runner(network, kv_dtype, config, max_len, device, encoder)
    if kv_dtype == torch.float8_e4m3fn:
        raise InvalidArgumentError('kv_cache_dtype="fp8" needs a GPU')
    block_bytes = config.block_size * kv_bytes_per_token(network.config, kv_dtype)
    num_blocks = num_kv_blocks(config, block_bytes, max_len)
    buffers = _buffers(config, network.config, max_len, device)
    return ModelRunner(network, kv_dtype, num_blocks, config.block_size, buffers, device, encoder), num_blocks


def _quantization(name: str | None, device: torch.device) -> Quantization | ActivationQuantization | None:
    if name in GPU_QUANTIZATIONS and not uses_triton(torch.empty(0, device=device)):
        raise InvalidArgumentError(f"quantization={name!r} needs a GPU, not device={str(device)!r}")
    scheme = find_quantization(name or "") or find_activation_quantization(name or "")
    if scheme is None and name not in (None, "dequantize"):
        known = ", ".join(map(repr, QUANTIZATIONS + GPU_QUANTIZATIONS))
        raise InvalidArgumentError(f'quantization={name!r}: must be None, {known} or "dequantize"')
    return scheme


def _chat_template(checkpoint: Checkpoint, tokenizer: Tokenizer) -> ChatTemplate | MolLlamaTemplate:
    if isinstance(checkpoint, MolLlamaCheckpoint):
        return MolLlamaTemplate(tokenizer.control_tokens)
    return ChatTemplate(checkpoint.tokenizer_config.get("chat_template"), checkpoint.tokenizer_config)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _buffers(
    config: EngineConfig, decoder: DecoderConfig, max_len: int, device: torch.device
) -> InputBuffers:
    return InputBuffers(
        config.max_batched_tokens,
        config.max_num_seqs,
        max_blocks=-(-max_len // config.block_size) + 1,
        block_size=config.block_size,
        device=device,
        num_sections=len(decoder.rope.sections) or 1,
        vocab_size=decoder.vocab_size,
    )


def _eos_ids(checkpoint: Checkpoint, tokenizer: Tokenizer) -> frozenset[int]:
    """Every id that ends a turn: of generation_config.json, config.json and the tokenizer."""
    found: set[int] = set(tokenizer.eos_ids)
    for source in (checkpoint.generation_config, checkpoint.config):
        value = source.get("eos_token_id")
        found.update([value] if isinstance(value, int) else value or [])
    if any(isinstance(i, bool) or not isinstance(i, int) for i in found):
        raise CheckpointError(f"{checkpoint.path}: eos_token_id is not an integer or a list of integers")
    return frozenset(found)
