"""Runs encoders and model on a batch and owns the KV cache's memory."""

from contextlib import AbstractContextManager, nullcontext

import torch

from flexjudge_fast.engine.batch import Batch
from flexjudge_fast.engine.encoder_runner import EncoderRunner
from flexjudge_fast.engine.input_buffers import InputBuffers
from flexjudge_fast.models.config import DecoderConfig
from flexjudge_fast.models.decoder import Decoder
from flexjudge_fast.models.packed import PackedModel
from flexjudge_fast.ops.backend import one_torch_thread
from flexjudge_fast.ops.kv_cache import copy_blocks, kv_row_size


class ModelRunner:
    """`run(batch)` encodes media, copies forked blocks, runs every layer, and gives the logits asked for."""

    def __init__(
        self,
        model: Decoder | PackedModel,
        kv_dtype: torch.dtype,
        num_blocks: int,
        block_size: int,
        buffers: InputBuffers,
        device: torch.device,
        encoder: EncoderRunner | None = None,
    ) -> None:
        config = model.config
        self.model = model
        self.buffers = buffers
        self.encoder = encoder
        self.num_forward_tokens = 0
        row_size = kv_row_size(config.head_dim, kv_dtype)
        shape = (config.num_layers, 2, num_blocks, block_size, config.num_kv_heads, row_size)
        self.cache = torch.empty(shape, dtype=kv_dtype, device=device)  # only written slots are ever read

    @torch.inference_mode()
    def run(self, batch: Batch) -> tuple[torch.Tensor, list[bool]]:
        """The logits of the chunks' `logit_positions`, in order.

        Returns:
            [num_rows, vocab_size] float32; for each row whether its logits are all finite.
        """
        embeddings = {} if self.encoder is None else self.encoder.run(batch)
        inputs = self.buffers.fill(batch, embeddings)
        copy_blocks(self.cache, batch.block_copies)
        logits, finite = self.model.step(inputs.token_ids, inputs.attention, self.cache, inputs.logit_rows)
        self.num_forward_tokens += batch.num_tokens
        return logits, finite.tolist()

    @property
    def num_threads(self) -> int:
        """Threads of the compiled ops."""
        return self.model.num_threads if isinstance(self.model, PackedModel) else torch.get_num_threads()

    def threads(self) -> AbstractContextManager[None]:
        """What a step runs in: kernels with threads of their own must not share the cores with torch's."""
        return one_torch_thread() if isinstance(self.model, PackedModel) else nullcontext()

    def release(self) -> None:
        """Drop weights and cache; the runner can't run any more."""
        del self.model, self.cache, self.encoder


def kv_bytes_per_token(config: DecoderConfig, dtype: torch.dtype) -> int:
    """Bytes of keys and values that one token takes over all layers."""
    return 2 * config.num_layers * config.num_kv_heads * kv_row_size(config.head_dim, dtype) * dtype.itemsize
