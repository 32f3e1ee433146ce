"""Puts an engine together: checkpoint, tokenizer, model, KV cache, scheduler."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from flexjudge_fast.engine.config import (
    KV_CACHE_DTYPES,
    EngineConfig,
    num_kv_blocks,
    parse_bytes,
    pick_device,
    pick_dtype,
)
from flexjudge_fast.engine.encoder_cache import EncoderCache
from flexjudge_fast.engine.encoder_runner import EncoderRunner
from flexjudge_fast.engine.encoder_store import EncoderStore
from flexjudge_fast.engine.input_buffers import InputBuffers
from flexjudge_fast.engine.model_runner import ModelRunner, kv_bytes_per_token
from flexjudge_fast.engine.prompts import PromptEncoder
from flexjudge_fast.engine.scheduler import Scheduler, SchedulerLimits
from flexjudge_fast.engine.vision_input import VisionInput
from flexjudge_fast.errors import CheckpointError, InvalidArgumentError
from flexjudge_fast.media.reader import MediaReader
from flexjudge_fast.media.vision_processor import VisionProcessor, read_vision_processor
from flexjudge_fast.models.config import DecoderConfig, read_decoder_config
from flexjudge_fast.models.registry import load_model, load_vision
from flexjudge_fast.models.vision_config import VisionConfig, read_vision_config
from flexjudge_fast.ops.backend import isa
from flexjudge_fast.prompts.chat_template import ChatTemplate
from flexjudge_fast.prompts.tokenizer import Tokenizer
from flexjudge_fast.weights.checkpoint import Checkpoint, open_checkpoint
from flexjudge_fast.weights.quantization import QUANTIZATIONS, find_quantization


@dataclass(frozen=True)
class EngineParts:
    """Everything an `Engine` is made of."""

    checkpoint: Checkpoint
    tokenizer: Tokenizer
    prompts: PromptEncoder
    eos_ids: frozenset[int]
    max_model_len: int
    arithmetic: str  # what bits depend on beside weights and dtype
    scheduler: Scheduler
    runner: ModelRunner


@dataclass(frozen=True)
class MediaParts:
    """What a vision-language model needs beside the language model."""

    input: VisionInput
    reader: MediaReader
    encoder: EncoderRunner


def load_parts(
    model: str | Path,
    device: str | torch.device,
    dtype: str | torch.dtype,
    quantization: str | None,
    ignore_config: Sequence[str],
    config: EngineConfig,
) -> EngineParts:
    """Load a checkpoint and size everything around it."""
    scheme = find_quantization(quantization or "")
    if scheme is None and quantization not in (None, "dequantize"):
        known = ", ".join(map(repr, QUANTIZATIONS))
        raise InvalidArgumentError(f'quantization={quantization!r}: must be None, {known} or "dequantize"')
    where = pick_device(device)
    checkpoint = open_checkpoint(model)
    picked = pick_dtype(dtype, checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype"))
    decoder = read_decoder_config(checkpoint.config, ignore_config)
    vision = read_vision_config(checkpoint.config, ignore_config)
    num_threads = config.num_threads or torch.get_num_threads()
    limit = decoder.max_positions
    max_len = config.max_model_len or limit
    if max_len > limit:
        raise InvalidArgumentError(f"max_model_len={config.max_model_len}: the checkpoint's limit is {limit}")
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
    media = None
    if vision is not None:
        tower = load_vision(checkpoint, vision, decoder, picked, where, num_threads)
        processor = _processor(checkpoint, vision)
        cache = _encoder_cache(config, checkpoint, picked, vision)
        encoder = EncoderRunner(tower, processor, cache, config.max_encoder_patches, where, num_threads)
        media = MediaParts(VisionInput(vision), MediaReader(processor), encoder)
    checkpoint.start_hashing()
    kv_dtype = KV_CACHE_DTYPES.get(config.kv_cache_dtype, picked)
    block_bytes = config.block_size * kv_bytes_per_token(decoder, kv_dtype)
    num_blocks = num_kv_blocks(config, block_bytes, max_len, where)
    buffers = _buffers(config, decoder, max_len, where)
    limits = SchedulerLimits(
        config.block_size, config.max_batched_tokens, config.max_num_seqs, config.prefix_caching
    )
    return EngineParts(
        checkpoint=checkpoint,
        tokenizer=tokenizer,
        prompts=PromptEncoder(
            tokenizer,
            _chat_template(checkpoint),
            decoder.vocab_size,
            None if media is None else media.input,
            None if media is None else media.reader,
        ),
        eos_ids=_eos_ids(checkpoint, tokenizer),
        max_model_len=max_len,
        arithmetic=f"{isa()}, activations {config.activations}, kv cache {_name(kv_dtype)}",
        scheduler=Scheduler(limits, num_blocks),
        runner=ModelRunner(
            network,
            kv_dtype,
            num_blocks,
            config.block_size,
            buffers,
            where,
            None if media is None else media.encoder,
        ),
    )


def _chat_template(checkpoint: Checkpoint) -> ChatTemplate:
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


def _processor(checkpoint: Checkpoint, vision: VisionConfig) -> VisionProcessor:
    """How the checkpoint wants pixels; its patches must be the tower's."""
    processor = read_vision_processor(*checkpoint.processor_configs())
    for name in ("patch_size", "merge_size", "temporal_patch_size"):
        if getattr(processor, name) != getattr(vision, name):
            raise CheckpointError(
                f"{checkpoint.path}: {name} is {getattr(processor, name)} in preprocessor_config.json, "
                f"{getattr(vision, name)} in config.json"
            )
    return processor


def _encoder_cache(
    config: EngineConfig, checkpoint: Checkpoint, dtype: torch.dtype, vision: VisionConfig
) -> EncoderCache:
    store = None
    if config.encoder_cache_dir is not None:
        # What embeddings depend on beside the medium; the media's keys hold the processor's settings.
        salt = f"{checkpoint.weights_hash()} {dtype} {isa()} {vision}".encode()
        limit = parse_bytes("encoder_cache_disk", config.encoder_cache_disk)
        store = EncoderStore(Path(config.encoder_cache_dir), limit, salt)
    memory = config.encoder_cache_memory
    return EncoderCache(parse_bytes("encoder_cache_memory", memory) if memory else 0, store)


def _eos_ids(checkpoint: Checkpoint, tokenizer: Tokenizer) -> frozenset[int]:
    """Every id that ends a turn: of generation_config.json, config.json and the tokenizer."""
    found: set[int] = set(tokenizer.eos_ids)
    for source in (checkpoint.generation_config, checkpoint.config):
        value = source.get("eos_token_id")
        found.update([value] if isinstance(value, int) else value or [])
    if any(isinstance(i, bool) or not isinstance(i, int) for i in found):
        raise CheckpointError(f"{checkpoint.path}: eos_token_id is not an integer or a list of integers")
    return frozenset(found)
