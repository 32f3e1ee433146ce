"""What is done to rows of several molecules, one behind the other, so that none changes another's bits."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812

_LANES = 32  # torch computes so many numbers at once, and what is left at a tensor's end by other means


def gelu(x: torch.Tensor) -> torch.Tensor:
    """The exact GELU of [num_rows, n]; a row's bits do not depend on the rows beside it."""
    extra = -x.shape[1] % _LANES
    return F.gelu(F.pad(x, (0, extra)))[:, : x.shape[1]] if extra else F.gelu(x)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sizes: tuple[Sequence[int], Sequence[int]],
    num_heads: int,
) -> torch.Tensor:
    """Softmax attention, molecule by molecule, so that its bits are those of a molecule alone.

    Args:
        query: [num_queries, hidden]; key, value: [num_keys, hidden].
        sizes: of each molecule, how many queries and how many keys are its own.

    Returns:
        [num_queries, hidden].
    """
    queries, keys, values = (
        x.unflatten(-1, (num_heads, -1)).split(list(count))
        for x, count in ((query, sizes[0]), (key, sizes[1]), (value, sizes[1]))
    )
    parts = [
        F.scaled_dot_product_attention(*(x.transpose(0, 1).unsqueeze(0) for x in one)).squeeze(0)
        for one in zip(queries, keys, values, strict=True)
    ]
    return torch.cat([part.transpose(0, 1).flatten(1) for part in parts])
