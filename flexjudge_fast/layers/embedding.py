"""Token embedding look-up."""

import torch

from flexjudge_fast.ops.embedding import embedding, quantized_embedding
from flexjudge_fast.weights.tensor import QuantTensor, Weight


class Embedding:
    """Rows of a [vocab_size, hidden] weight; quantised rows are expanded as they are read."""

    def __init__(self, weight: Weight, dtype: torch.dtype) -> None:
        self.weight = weight
        self.dtype = dtype

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        """token_ids: [num_tokens] int64. Returns [num_tokens, hidden] in the model's dtype."""
        if isinstance(self.weight, QuantTensor):
            return quantized_embedding(token_ids, self.weight.blocks, self.weight.format.name, self.dtype)
        return embedding(token_ids, self.weight.data)
