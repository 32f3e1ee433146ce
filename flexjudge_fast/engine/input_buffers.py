"""Turns a batch of plain numbers into the tensors a model step reads."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from flexjudge_fast.engine.batch import Batch, Chunk
from flexjudge_fast.layers.attention import AttentionInput


@dataclass(frozen=True)
class ModelInput:
    """One step's tensors. Filled by `InputBuffers.fill`."""

    token_ids: torch.Tensor  # [num_tokens] int64
    attention: AttentionInput
    logit_rows: torch.Tensor  # [num_rows] int64, rows of the step whose logits are needed


class InputBuffers:
    """Memory for the largest step, allocated once; `fill` gives views of it, valid until the next `fill`."""

    def __init__(
        self, max_tokens: int, max_seqs: int, max_blocks: int, block_size: int, device: torch.device
    ) -> None:
        self.block_size = block_size
        self.device = device
        # ids, positions, slots, logit rows; then what sequences have: query starts and context lengths
        self._tokens = torch.zeros(4, max_tokens, dtype=torch.int64)
        self._sequences = torch.zeros(2, max_seqs + 1, dtype=torch.int64)
        self._tables = torch.zeros(max_seqs * max_blocks, dtype=torch.int64)
        # The same memory: numpy takes a tenth of torch's time for a few numbers.
        self._numbers, self._starts_lens = self._tokens.numpy(), self._sequences.numpy()
        self._table_numbers = self._tables.numpy()

    def fill(self, batch: Batch) -> ModelInput:
        """Write ids, positions, slots and block tables of `batch`."""
        width = max((len(chunk.request.block_table) for chunk in batch.chunks), default=0)
        rows: list[int] = []
        starts, lens = self._starts_lens
        at = 0
        for i, chunk in enumerate(batch.chunks):
            end, table = at + chunk.num_tokens, chunk.request.block_table
            row = self._table_numbers[i * width : (i + 1) * width]
            row[: len(table)] = table
            self._fill_tokens(chunk, slice(at, end), row)
            rows.extend(at + position - chunk.start for position in chunk.logit_positions)
            starts[i + 1], lens[i] = end, chunk.end
            at = end
        self._numbers[3, : len(rows)] = rows
        count = len(batch.chunks)
        ids, positions, slots = self._tokens[:3, :at].to(self.device).unbind()
        attention = AttentionInput(
            positions,
            slots,
            self._tables[: count * width].view(count, width).to(self.device),
            self._sequences[0, : count + 1],
            self._sequences[1, :count],
            max((chunk.end for chunk in batch.chunks), default=0),
        )
        return ModelInput(ids, attention, self._tokens[3, : len(rows)].to(self.device))

    def _fill_tokens(self, chunk: Chunk, where: slice, table: "np.ndarray[Any, np.dtype[np.int64]]") -> None:
        """Ids, positions and slots of one chunk. table: [max_blocks]."""
        ids, positions, slots = self._numbers[:3, where]
        if chunk.num_tokens == 1:
            start = chunk.start
            ids[0], positions[0] = chunk.request.token_ids[start], start
            slots[0] = table[start // self.block_size] * self.block_size + start % self.block_size
            return
        ids[:] = chunk.request.token_ids[chunk.start : chunk.end]
        positions[:] = np.arange(chunk.start, chunk.end)
        slots[:] = table[positions // self.block_size] * self.block_size + positions % self.block_size
