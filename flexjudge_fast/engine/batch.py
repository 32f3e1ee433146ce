"""What the scheduler decides for one step, as plain numbers: no tensor, no device."""

from dataclasses import dataclass

from flexjudge_fast.engine.request import Request


@dataclass(frozen=True)
class Chunk:
    """`num_tokens` tokens of a request, from position `start` on. Filled by the scheduler."""

    request: Request
    start: int
    num_tokens: int

    @property
    def end(self) -> int:
        return self.start + self.num_tokens

    @property
    def logit_positions(self) -> range:
        """Positions in the request whose logits this step must give."""
        return range(max(self.start, self.request.first_logit), self.end)


@dataclass(frozen=True)
class Batch:
    """One step: the chunks to run and the blocks to copy before they run. Filled by the scheduler."""

    chunks: tuple[Chunk, ...]
    block_copies: tuple[tuple[int, int], ...]

    @property
    def num_tokens(self) -> int:
        return sum(chunk.num_tokens for chunk in self.chunks)
