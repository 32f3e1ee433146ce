"""Picks the model class that a checkpoint's `architectures` names, and loads it."""

from collections.abc import Collection

import torch

from flexjudge_fast.models.config import read_decoder_config
from flexjudge_fast.models.decoder import Decoder
from flexjudge_fast.models.llama import LlamaForCausalLM
from flexjudge_fast.models.loader import TensorLoader
from flexjudge_fast.models.qwen2 import Qwen2ForCausalLM
from flexjudge_fast.weights.checkpoint import Checkpoint


def load_model(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    max_len: int | None = None,
    expand: bool = False,
    ignore_config: Collection[str] = (),
) -> Decoder:
    """Load a checkpoint's language model.

    Args:
        max_len: positions to prepare for, in tokens; the checkpoint's own limit when `None`.
        expand: turn quantised weights into dense ones at load.
        ignore_config: names of unknown config fields to accept.

    Raises:
        UnsupportedCheckpointError: the architecture or a config field is not supported.
        CheckpointError: a tensor is missing, has the wrong shape, or is not finite.
    """
    config = read_decoder_config(checkpoint.config, ignore_config)
    classes: dict[str, type[Decoder]] = {
        "LlamaForCausalLM": LlamaForCausalLM,
        "Qwen2ForCausalLM": Qwen2ForCausalLM,
    }
    loader = TensorLoader(checkpoint, dtype, device, expand)
    return classes[config.architecture](config, loader, max_len or config.max_positions)
