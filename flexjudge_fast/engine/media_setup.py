"""Puts together what a multimodal model needs beside the language model: readers, encoders, their cache."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flexjudge_fast.engine.config import EngineConfig, parse_bytes
from flexjudge_fast.engine.encoder_cache import EncoderCache
from flexjudge_fast.engine.encoder_runner import EncoderRunner, VisionEncoder
from flexjudge_fast.engine.encoder_store import EncoderStore
from flexjudge_fast.engine.media_input import MediaInput, MoleculeInput
from flexjudge_fast.errors import CheckpointError
from flexjudge_fast.media.audio_processor import AudioProcessor, read_audio_processor
from flexjudge_fast.media.molecule_limits import MoleculeLimits
from flexjudge_fast.media.molecule_processor import read_molecule_processor
from flexjudge_fast.media.reader import MediaReader
from flexjudge_fast.media.vision_processor import VisionProcessor, read_vision_processor
from flexjudge_fast.models.audio_config import AudioConfig, read_audio_config
from flexjudge_fast.models.config import DecoderConfig
from flexjudge_fast.models.mol_llama import MolLlamaCheckpoint
from flexjudge_fast.models.registry import load_audio, load_molecule, load_vision
from flexjudge_fast.models.vision_config import VisionConfig, read_vision_config
from flexjudge_fast.ops.backend import isa
from flexjudge_fast.weights.checkpoint import Checkpoint
from flexjudge_fast.weights.processor_config import ProcessorConfig


@dataclass(frozen=True)
class MediaParts:
    """How media enter the prompt, who reads them, and who encodes them."""

    input: MediaInput | MoleculeInput
    reader: MediaReader
    encoder: EncoderRunner


def load_media(
    checkpoint: Checkpoint,
    run: Mapping[str, Any],
    decoder: DecoderConfig,
    dtype: torch.dtype,
    device: torch.device,
    config: EngineConfig,
    ignore: Sequence[str],
) -> MediaParts | None:
    """Load a checkpoint's towers and processors; `None` for a text model. `run`: see `model_config`."""
    if isinstance(checkpoint, MolLlamaCheckpoint):
        return _load_molecules(checkpoint, decoder, dtype, device, config)
    vision, audio = read_vision_config(run, ignore), read_audio_config(run, ignore)
    if vision is None:
        return None
    num_threads = config.num_threads or torch.get_num_threads()
    sees, hears = _vision_processor(checkpoint, vision), _audio_processor(checkpoint, audio)
    hearing = None if audio is None else load_audio(checkpoint, audio, decoder, dtype, device, num_threads)
    tower = load_vision(checkpoint, vision, decoder, dtype, device, num_threads)
    # What embeddings depend on beside the medium; the media's keys hold the processors' settings.
    salt = f"{dtype} {isa(device)} {vision} {audio}"
    return MediaParts(
        MediaInput(vision, audio),
        MediaReader(sees, hears),
        EncoderRunner(
            VisionEncoder(tower, sees, num_threads),
            hearing,
            None,
            _encoder_cache(config, checkpoint, salt),
            config.max_encoder_patches,
            dtype,
            device,
        ),
    )


def _load_molecules(
    checkpoint: MolLlamaCheckpoint,
    decoder: DecoderConfig,
    dtype: torch.dtype,
    device: torch.device,
    config: EngineConfig,
) -> MediaParts:
    encoder = load_molecule(checkpoint, decoder, device, config.num_threads or torch.get_num_threads())
    names = read_molecule_processor(checkpoint.path, encoder.num_queries, encoder.unimol.num_tokens)
    salt = f"{dtype} {isa(device)} {checkpoint.molecule}"
    cache = _encoder_cache(config, checkpoint, salt)
    limits = MoleculeLimits(timeout=config.conformer_timeout)
    return MediaParts(
        MoleculeInput(checkpoint.mol_token_id),
        MediaReader(molecules=names, limits=limits),
        EncoderRunner(None, None, encoder, cache, config.max_encoder_patches, dtype, device),
    )


def _vision_processor(checkpoint: Checkpoint, vision: VisionConfig) -> VisionProcessor:
    """How the checkpoint wants pixels; its patches must be the tower's."""
    config = checkpoint.processor_config("image")
    processor = read_vision_processor(config, checkpoint.processor_config("video"))
    for name in ("patch_size", "merge_size", "temporal_patch_size"):
        _check_same(checkpoint, config, name, getattr(processor, name), getattr(vision, name))
    return processor


def _audio_processor(checkpoint: Checkpoint, audio: AudioConfig | None) -> AudioProcessor | None:
    """How the checkpoint wants sound; its spectrogram must be the tower's."""
    if audio is None:
        return None
    config = checkpoint.processor_config("audio")
    processor = read_audio_processor(config)
    _check_same(checkpoint, config, "feature_size", processor.feature_size, audio.num_mel_bins)
    return processor


def _check_same(checkpoint: Checkpoint, config: ProcessorConfig, name: str, wanted: int, found: int) -> None:
    if wanted != found:
        raise CheckpointError(
            f"{checkpoint.path}: {name} is {wanted} in {config.where}, {found} in config.json"
        )


def _encoder_cache(config: EngineConfig, checkpoint: Checkpoint, salt: str) -> EncoderCache:
    store = None
    if config.encoder_cache_dir is not None:
        limit = parse_bytes("encoder_cache_disk", config.encoder_cache_disk)
        key = f"{checkpoint.weights_hash()} {salt}".encode()
        store = EncoderStore(Path(config.encoder_cache_dir), limit, key)
    memory = config.encoder_cache_memory
    return EncoderCache(parse_bytes("encoder_cache_memory", memory) if memory else 0, store)
