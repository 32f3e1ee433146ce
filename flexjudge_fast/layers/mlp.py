"""Gated MLP."""

import torch

from flexjudge_fast.layers.linear import Activations, Linear
from flexjudge_fast.ops.linear_w8a8 import QuantizedTokens
from flexjudge_fast.ops.swiglu import swiglu, swiglu_quantized


class GatedMLP:
    """`down(silu(gate(x)) * up(x))` with gate and up in one matrix."""

    def __init__(self, gate_up: Linear, down: Linear) -> None:
        self.gate_up = gate_up
        self.down = down

    def __call__(self, x: Activations) -> torch.Tensor:
        """[num_tokens, hidden], as `gate_up` takes it, to [num_tokens, hidden]."""
        gate_up = self.gate_up(x)
        if self.down.takes is None:
            return self.down(swiglu(gate_up))
        return self.down(QuantizedTokens(*swiglu_quantized(gate_up, self.down.takes), gate_up.dtype))
