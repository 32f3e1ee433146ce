"""The gated activation of Llama and Qwen2 MLPs."""

import torch
import torch.nn.functional as F  # noqa: N812


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up` (Shazeer 2020, eq. 6).

    Args:
        gate_up: [num_tokens, 2 * intermediate], gate first.

    Returns:
        [num_tokens, intermediate].
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
