"""Gated MLP."""

import torch

from flexjudge_fast.layers.linear import Linear
from flexjudge_fast.ops.swiglu import swiglu


class GatedMLP:
    """`down(silu(gate(x)) * up(x))` with gate and up in one matrix."""

    def __init__(self, gate_up: Linear, down: Linear) -> None:
        self.gate_up = gate_up
        self.down = down

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[num_tokens, hidden] to [num_tokens, hidden]."""
        return self.down(swiglu(self.gate_up(x)))
