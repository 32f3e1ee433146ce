"""How much of a GPU's memory the KV cache gets: what is free, less what a step needs at its worst."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from flexjudge_fast.engine.graph_ladder import GraphLadder
from flexjudge_fast.errors import InvalidArgumentError

_GRAPH_BYTES = 2 << 20  # some 400 launches
_TILINGS = 2  # of attention, with and without blocks in common: a graph each
_LOGIT_BYTES = 4 + 2 + 4 + 3  # float32, the product's, magnitudes, and three booleans


@dataclass(frozen=True)
class GpuMemory:
    """Bytes on a GPU once the weights are there.

    step: the most that the largest step takes beside weights and cache, as it was measured; encoder: that of
    the largest pass of an encoder. graphs: what recorded steps keep.
    """

    total: int
    free: int
    step: int
    encoder: int
    graphs: int

    def kv_cache(self, fraction: float) -> int:
        """Bytes for the KV cache: `fraction` of what is free and no step needs.

        Raises:
            InvalidArgumentError: nothing is left; it lists the terms.
        """
        # An encoder's pass ends before the model's step begins: the larger one counts.
        left = self.free - max(self.step, self.encoder) - self.graphs
        if left <= 0:
            terms = {
                "in all": self.total,
                "free once weights are loaded": self.free,
                "for the largest step (max_batched_tokens)": self.step,
                "for the largest pass of an encoder (max_encoder_patches)": self.encoder,
                "for recorded steps (max_num_seqs)": self.graphs,
            }
            listed = "; ".join(f"{size / 2**30:.2f} GiB {what}" for what, size in terms.items())
            raise InvalidArgumentError(f"the GPU's memory leaves nothing for the KV cache: {listed}")
        return int(left * fraction)


def graph_bytes(ladder: GraphLadder, vocab_size: int) -> int:
    """What recorded decode steps keep: one tensor of logits; one pool of memory for the largest step, mostly
    logits in 16 bits and what tells whether they are finite; and each the description of its launches."""
    rungs = len(ladder.num_seqs) * len(ladder.table_widths)
    return _LOGIT_BYTES * ladder.num_seqs[-1] * vocab_size + _TILINGS * rungs * _GRAPH_BYTES


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """The most memory that `work` takes beyond what is allocated before it."""
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()  # so that what is free is free
    return peak
