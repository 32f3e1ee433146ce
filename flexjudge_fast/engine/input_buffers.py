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
        self._tokens = torch.zeros(3, max_tokens, dtype=torch.int64)  # ids, positions, slots
        self._tables = torch.zeros(max_seqs, max_blocks, dtype=torch.int64)
        # The same memory: numpy takes a tenth of torch's time for a few numbers.
        self._numbers, self._table_rows = self._tokens.numpy(), self._tables.numpy()

    def fill(self, batch: Batch) -> ModelInput:
        """Write ids, positions, slots and block tables of `batch`."""
        rows: list[int] = []
        query_start, context_lens, at, width = [0], [], 0, 0
        for i, chunk in enumerate(batch.chunks):
            end, table = at + chunk.num_tokens, chunk.request.block_table
            self._table_rows[i, : len(table)] = table
            self._fill_tokens(chunk, slice(at, end), self._table_rows[i])
            rows.extend(at + position - chunk.start for position in chunk.logit_positions)
            query_start.append(end)
            context_lens.append(chunk.end)
            width, at = max(width, len(table)), end
        ids, positions, slots = self._tokens[:, :at].to(self.device)
        tables = self._tables[: len(batch.chunks), :width].to(self.device)
        attention = AttentionInput(positions, slots, tables, query_start, context_lens)
        return ModelInput(ids, attention, torch.tensor(rows, dtype=torch.int64, device=self.device))

    def _fill_tokens(self, chunk: Chunk, where: slice, table: "np.ndarray[Any, np.dtype[np.int64]]") -> None:
        """Ids, positions and slots of one chunk. table: [max_blocks]."""
        ids, positions, slots = self._numbers[:, where]
        if chunk.num_tokens == 1:
            start = chunk.start
            ids[0], positions[0] = chunk.request.token_ids[start], start
            slots[0] = table[start // self.block_size] * self.block_size + start % self.block_size
            return
        ids[:] = chunk.request.token_ids[chunk.start : chunk.end]
        positions[:] = np.arange(chunk.start, chunk.end)
        slots[:] = table[positions // self.block_size] * self.block_size + positions % self.block_size
