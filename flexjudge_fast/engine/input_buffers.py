"""Turns a batch of plain numbers into the tensors a model step reads."""

from dataclasses import dataclass

import torch

from flexjudge_fast.engine.batch import Batch
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

    def fill(self, batch: Batch) -> ModelInput:
        """Write ids, positions, slots and block tables of `batch`."""
        rows: list[int] = []
        query_start, context_lens, at = [0], [], 0
        width = 0
        for i, chunk in enumerate(batch.chunks):
            request, end = chunk.request, at + chunk.num_tokens
            table = torch.tensor(request.block_table, dtype=torch.int64)
            positions = torch.arange(chunk.start, chunk.end)
            self._tokens[0, at:end] = torch.tensor(request.token_ids[chunk.start : chunk.end])
            self._tokens[1, at:end] = positions
            self._tokens[2, at:end] = table[positions // self.block_size] * self.block_size
            self._tokens[2, at:end] += positions % self.block_size
            self._tables[i, : len(table)] = table
            rows.extend(at + position - chunk.start for position in chunk.logit_positions)
            query_start.append(end)
            context_lens.append(chunk.end)
            width, at = max(width, len(table)), end
        ids, positions, slots = self._tokens[:, :at].to(self.device)
        tables = self._tables[: len(batch.chunks), :width].to(self.device)
        attention = AttentionInput(positions, slots, tables, query_start, context_lens)
        return ModelInput(ids, attention, torch.tensor(rows, dtype=torch.int64, device=self.device))
