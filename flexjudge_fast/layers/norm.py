"""RMSNorm and LayerNorm layers."""

import torch
import torch.nn.functional as F  # noqa: N812

from flexjudge_fast.layers.linear import Activations, Linear
from flexjudge_fast.ops.linear_w8a8 import QuantizedTokens
from flexjudge_fast.ops.rms_norm import add_rms_norm, add_rms_norm_quantized, rms_norm, rms_norm_quantized


class RMSNorm:
    """Root mean square norm with a learned weight [hidden]."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        self.weight = weight
        self.eps = eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns `(norm(residual + x), residual + x)`."""
        return add_rms_norm(x, residual, self.weight, self.eps)

    def before(self, linear: Linear, x: torch.Tensor) -> Activations:
        """The norm as `linear` takes it: where that is quantised, in the same launch."""
        if linear.takes is None:
            return self(x)
        return QuantizedTokens(*rms_norm_quantized(x, self.weight, self.eps, linear.takes), x.dtype)

    def add_before(
        self, linear: Linear, x: torch.Tensor, residual: torch.Tensor
    ) -> tuple[Activations, torch.Tensor]:
        """`add`, the norm as `linear` takes it."""
        if linear.takes is None:
            return self.add(x, residual)
        codes, scales, total = add_rms_norm_quantized(x, residual, self.weight, self.eps, linear.takes)
        return QuantizedTokens(codes, scales, x.dtype), total


class LayerNorm:
    """Layer norm (Ba et al. 2016) with a learned weight and bias, [hidden] each."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> None:
        self.weight = weight
        self.bias = bias
        self.eps = eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
