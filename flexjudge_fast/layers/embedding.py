"""Token embedding look-up."""

import torch

from flexjudge_fast.ops.embedding import embedding, quantized_embedding
from flexjudge_fast.weights.tensor import QuantTensor, Weight


class Embedding:
    """Rows of a [vocab_size, hidden] weight; quantised rows are expanded as they are read."""

    def __init__(self, weight: Weight, dtype: torch.dtype) -> None:
        self.weight = weight
        self.dtype = dtype

    def __call__(self, token_ids: torch.Tensor, media: torch.Tensor | None = None) -> torch.Tensor:
        """Look up rows.

        token_ids: [num_tokens] int64; with media, those from vocab_size on are rows of `media`
            [num_media, hidden]. Returns [num_tokens, hidden] in the model's dtype.
        """
        if isinstance(self.weight, QuantTensor):
            blocks, name = self.weight.blocks, self.weight.format.name
            return quantized_embedding(token_ids, blocks, name, self.dtype, media)
        return embedding(token_ids, self.weight.data, media)
