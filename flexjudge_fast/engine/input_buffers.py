"""Turns a batch of plain numbers into the tensors a model step reads."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from flexjudge_fast.engine.batch import Batch, Chunk
from flexjudge_fast.engine.graph_ladder import Rung
from flexjudge_fast.layers.attention import AttentionInput


@dataclass(frozen=True)
class ModelInput:
    """One step's tensors. Filled by `InputBuffers.fill`."""

    token_ids: torch.Tensor  # [num_tokens] int64
    attention: AttentionInput
    logit_rows: torch.Tensor  # [num_rows] int64, rows of the step whose logits are needed


class InputBuffers:
    """Memory for the largest step, allocated once; `fill` gives views of it, valid until the next `fill`.

    Args:
        num_sections: positions of a token: 1, or 3 for M-RoPE.
        vocab_size: ids from here on stand for the rows of a step's media embeddings.
        pin: for copies to a GPU that run beside the host.
    """

    def __init__(
        self,
        max_tokens: int,
        max_seqs: int,
        max_blocks: int,
        block_size: int,
        device: torch.device,
        num_sections: int = 1,
        vocab_size: int = 0,
        pin: bool = False,
    ) -> None:
        self.block_size = block_size
        self.device = device
        self.num_sections = num_sections
        self.vocab_size = vocab_size
        # ids, places in the sequence, slots, logit rows; then query starts and context lengths
        max_tokens = max(max_tokens, max_seqs)  # of a padded decode step
        self._tokens = torch.zeros(4, max_tokens, dtype=torch.int64, pin_memory=pin)
        self._sequences = torch.zeros(2, max_seqs + 1, dtype=torch.int64, pin_memory=pin)
        self._positions = torch.zeros(num_sections * max_tokens, dtype=torch.int64, pin_memory=pin)
        self._tables = torch.zeros(max_seqs * max_blocks, dtype=torch.int64, pin_memory=pin)
        # The same memory: numpy takes a tenth of torch's time for a few numbers.
        self._numbers, self._starts_lens = self._tokens.numpy(), self._sequences.numpy()
        self._table_numbers = self._tables.numpy()

    def fill(
        self,
        batch: Batch,
        embeddings: Mapping[bytes, torch.Tensor] | None = None,
        rung: Rung | None = None,
    ) -> ModelInput:
        """Write ids, positions, slots and block tables of `batch`.

        Args:
            embeddings: [num_tokens, hidden] of the media whose placeholders are in the batch, by content key.
            rung: of a decode step, the size it is padded to, by sequences that see and write nothing.
        """
        width = max((len(chunk.request.block_table) for chunk in batch.chunks), default=0)
        width = width if rung is None else rung.table_width
        rows: list[int] = []
        media: list[torch.Tensor] = []
        starts, lens = self._starts_lens
        at = 0
        for i, chunk in enumerate(batch.chunks):
            end, table = at + chunk.num_tokens, chunk.request.block_table
            row = self._table_numbers[i * width : (i + 1) * width]
            row[: len(table)] = table
            self._fill_tokens(chunk, slice(at, end), row)
            if chunk.request.media:
                media += self._fill_media(chunk, at, sum(map(len, media)), embeddings or {})
            rows.extend(at + position - chunk.start for position in chunk.logit_positions)
            starts[i + 1], lens[i] = end, chunk.end
            at = end
        count = len(batch.chunks)
        if rung is not None:
            self._fill_padding(slice(count, rung.num_seqs), width)
            rows.extend(range(count, rung.num_seqs))
            count = at = rung.num_seqs
        self._numbers[3, : len(rows)] = rows
        ids, places, slots = self._tokens[:3, :at].to(self.device).unbind()
        positions = places if self.num_sections == 1 else self._sectioned(batch, at)
        attention = AttentionInput(
            positions,
            slots,
            self._tables[: count * width].view(count, width).to(self.device),
            self._sequences[0, : count + 1],
            self._sequences[1, :count],
            max((chunk.end for chunk in batch.chunks), default=0),
            torch.cat(media) if media else None,
        )
        return ModelInput(ids, attention, self._tokens[3, : len(rows)].to(self.device))

    def _fill_tokens(self, chunk: Chunk, where: slice, table: NDArray[np.int64]) -> None:
        """Ids, places and slots of one chunk. table: [max_blocks]."""
        ids, places, slots = self._numbers[:3, where]
        if chunk.num_tokens == 1:
            start = chunk.start
            known = chunk.request.token_ids
            ids[0], places[0] = known[start] if start < len(known) else 0, start  # 0: the device knows it
            slots[0] = table[start // self.block_size] * self.block_size + start % self.block_size
            return
        ids[:] = chunk.request.token_ids[chunk.start : chunk.end]
        places[:] = np.arange(chunk.start, chunk.end)
        slots[:] = table[places // self.block_size] * self.block_size + places % self.block_size

    def _fill_padding(self, where: slice, width: int) -> None:
        """Sequences of one token and no context."""
        starts, lens = self._starts_lens
        self._numbers[:2, where] = 0
        self._numbers[2, where] = -1
        starts[where.start + 1 : where.stop + 1] = np.arange(where.start + 1, where.stop + 1)
        lens[where] = 0
        self._table_numbers[where.start * width : where.stop * width] = 0

    def _fill_media(
        self, chunk: Chunk, at: int, num_rows: int, embeddings: Mapping[bytes, torch.Tensor]
    ) -> list[torch.Tensor]:
        """Put the chunk's placeholders, whose tokens begin at `at`, behind `num_rows` rows of other media.

        Returns:
            The embeddings they stand for.
        """
        parts = []
        for run in chunk.request.media:
            first, last = max(run.start, chunk.start), min(run.end, chunk.end)
            if first < last:
                where = slice(at + first - chunk.start, at + last - chunk.start)
                self._numbers[0, where] = self.vocab_size + num_rows + np.arange(last - first)
                row = run.first_row + first - run.start
                parts.append(embeddings[run.media.key][row : row + last - first])
                num_rows += last - first
        return parts

    def _sectioned(self, batch: Batch, num_tokens: int) -> torch.Tensor:
        """[num_sections, num_tokens] positions."""
        positions = self._positions[: self.num_sections * num_tokens].view(self.num_sections, num_tokens)
        numbers, at = positions.numpy(), 0
        for chunk in batch.chunks:
            numbers[:, at : at + chunk.num_tokens] = chunk.request.positions_of(chunk.start, chunk.end)
            at += chunk.num_tokens
        numbers[:, at:] = 0
        return positions.to(self.device)
