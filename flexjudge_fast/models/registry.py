"""Picks the model class that a checkpoint's `architectures` names, and loads it."""

from collections.abc import Collection
from pathlib import Path

import torch

from flexjudge_fast.errors import InvalidArgumentError, UnsupportedCheckpointError
from flexjudge_fast.models.audio_config import AudioConfig
from flexjudge_fast.models.audio_tower import AudioTower
from flexjudge_fast.models.config import DecoderConfig
from flexjudge_fast.models.decoder import Decoder
from flexjudge_fast.models.llama import LlamaForCausalLM
from flexjudge_fast.models.loader import TensorLoader
from flexjudge_fast.models.mol_llama import MolLLaMA, MolLlamaCheckpoint, open_mol_llama
from flexjudge_fast.models.mol_llama_config import is_mol_llama
from flexjudge_fast.models.molecule_encoder import MoleculeEncoder
from flexjudge_fast.models.molecule_loader import EncoderLoader
from flexjudge_fast.models.packed import PackedModel
from flexjudge_fast.models.packed_audio import PackedAudioTower
from flexjudge_fast.models.packed_vision import PackedVisionTower
from flexjudge_fast.models.qwen2 import Qwen2ForCausalLM
from flexjudge_fast.models.qwen2_5_omni import Qwen2_5OmniThinkerForConditionalGeneration
from flexjudge_fast.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from flexjudge_fast.models.vision_config import VisionConfig
from flexjudge_fast.models.vision_tower import VisionTower
from flexjudge_fast.ops.backend import has_compiled_ops
from flexjudge_fast.weights.checkpoint import Checkpoint, open_checkpoint
from flexjudge_fast.weights.quantization import ActivationQuantization, Quantization


def open_model(
    model: str | Path,
    judge_backbone: str | Path | None = None,
    base_llm: str | Path | None = None,
    ignore: Collection[str] = (),
) -> Checkpoint:
    """Open a checkpoint; a Mol-LLaMA becomes a `MolLlamaCheckpoint`.

    Args:
        model: see `open_checkpoint`.
        judge_backbone: of a Mol-LLaMA, the Llama that takes the place of its base.
        base_llm: of a Mol-LLaMA saved without its base, the base.
        ignore: names of unknown config fields to accept unseen.

    Raises:
        CheckpointError: there is no such model, or the models do not fit each other.
        InvalidArgumentError: a backbone for another architecture.
    """
    checkpoint = open_checkpoint(model)
    if is_mol_llama(checkpoint.config):
        return open_mol_llama(checkpoint, judge_backbone, base_llm, ignore)
    for name, value in (("judge_backbone", judge_backbone), ("base_llm", base_llm)):
        if value is not None:
            raise InvalidArgumentError(f"{name}={str(value)!r}: {model} is no Mol-LLaMA")
    return checkpoint


def load_model(
    checkpoint: Checkpoint,
    config: DecoderConfig,
    dtype: torch.dtype,
    device: torch.device,
    max_len: int,
    expand: bool = False,
    quantization: Quantization | ActivationQuantization | None = None,
    activation_bytes: int = 2,
    num_threads: int = 1,
) -> Decoder | PackedModel:
    """Load a checkpoint's language model.

    Args:
        config: the checkpoint's, as `read_decoder_config` gives it.
        max_len: positions to prepare for, in tokens.
        expand: turn quantised weights into dense ones at load.
        quantization: quantise dense weights at load, or them and activations.
        activation_bytes, num_threads: of the CPU kernels, see `PackedModel`.

    Returns:
        On a CPU with the compiled ops a `PackedModel`, else the plain torch `Decoder`.

    Raises:
        CheckpointError: a tensor is missing, has the wrong shape, or is not finite.
    """
    classes: dict[str, type[Decoder]] = {
        "LlamaForCausalLM": LlamaForCausalLM,
        "MolLLaMA": MolLLaMA,
        "Qwen2ForCausalLM": Qwen2ForCausalLM,
        "Qwen2_5_VLForConditionalGeneration": Qwen2_5_VLForConditionalGeneration,
        "Qwen2_5OmniThinkerForConditionalGeneration": Qwen2_5OmniThinkerForConditionalGeneration,
    }
    is_packed = device.type == "cpu" and has_compiled_ops()
    loader = TensorLoader(checkpoint, dtype, device, expand, merge=not is_packed, quantization=quantization)
    model = classes[config.architecture](config, loader, max_len)
    return PackedModel(model, activation_bytes, num_threads) if is_packed else model


def load_vision(
    checkpoint: Checkpoint,
    config: VisionConfig,
    decoder: DecoderConfig,
    dtype: torch.dtype,
    device: torch.device,
    num_threads: int = 1,
) -> VisionTower | PackedVisionTower:
    """Load a checkpoint's vision tower, whose weights are plain: quantised ones are expanded to `dtype`.

    Raises:
        CheckpointError: a tensor is missing, has the wrong shape, or is not finite.
        UnsupportedCheckpointError: the tower does not fit the language model.
    """
    if config.out_hidden_size != decoder.hidden_size:
        raise UnsupportedCheckpointError(
            f"config field vision_config.out_hidden_size: {config.out_hidden_size}, the language model has "
            f"{decoder.hidden_size}"
        )
    is_packed = device.type == "cpu" and has_compiled_ops()
    tower = VisionTower(config, TensorLoader(checkpoint, dtype, device, expand=True, merge=not is_packed))
    return PackedVisionTower(tower, num_threads) if is_packed else tower


def load_audio(
    checkpoint: Checkpoint,
    config: AudioConfig,
    decoder: DecoderConfig,
    dtype: torch.dtype,
    device: torch.device,
    num_threads: int = 1,
) -> AudioTower | PackedAudioTower:
    """Load a checkpoint's audio tower; as `load_vision`."""
    if config.output_size != decoder.hidden_size:
        raise UnsupportedCheckpointError(
            f"config field audio_config.output_dim: {config.output_size}, the language model has "
            f"{decoder.hidden_size}"
        )
    is_packed = device.type == "cpu" and has_compiled_ops()
    tower = AudioTower(config, TensorLoader(checkpoint, dtype, device, expand=True, merge=not is_packed))
    return PackedAudioTower(tower, num_threads) if is_packed else tower


def load_molecule(
    checkpoint: MolLlamaCheckpoint,
    decoder: DecoderConfig,
    device: torch.device,
    num_threads: int = 1,
) -> MoleculeEncoder:
    """Load a Mol-LLaMA's way from molecules to embeddings, in float32 whatever the language model's dtype.

    Raises:
        CheckpointError: a tensor is missing, has the wrong shape, or is not finite.
    """
    is_packed = device.type == "cpu" and has_compiled_ops()
    load = EncoderLoader(checkpoint, device, num_threads if is_packed else None)
    return MoleculeEncoder(checkpoint.molecule, load, decoder.hidden_size)
