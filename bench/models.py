"""What a GGUF model costs at least: bytes read for a token, weights multiplied."""

from dataclasses import dataclass
from pathlib import Path

import gguf


@dataclass(frozen=True)
class ModelCost:
    """`read_bytes`: of all weights that one token needs; `layer_weights`: multiplied per token of a prompt
    (the LM head is needed for its last token only); `head_weights`: multiplied per decoded token besides."""

    read_bytes: int
    layer_weights: int
    head_weights: int

    def seconds(self, batch: int, num_tokens: int, read: float, int8: float) -> float:
        """The least time of a step of `batch` sequences, or of a prompt of `num_tokens` (batch 0).

        Args:
            read: GB/s; int8: GOP/s of byte products. Attention is left out.
        """
        if batch:
            operations = 2 * batch * (self.layer_weights + self.head_weights)
        else:
            operations = 2 * (num_tokens * self.layer_weights + self.head_weights)
        return max(self.read_bytes / read, operations / int8) * 1e-9


def model_cost(path: Path) -> ModelCost:
    """Read off the tensor table. An embedding table that is not the LM head too is not read as a whole."""
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    head = tensors.get("output.weight", tensors["token_embd.weight"])
    layers = [t for name, t in tensors.items() if name.startswith("blk.")]
    read_bytes = int(sum(t.n_bytes for t in layers) + head.n_bytes)
    weights = sum(int(t.n_elements) for t in layers if len(t.shape) == 2)
    return ModelCost(read_bytes, weights, int(head.n_elements))
