"""RMSNorm and LayerNorm layers."""

import torch
import torch.nn.functional as F  # noqa: N812

from flexjudge_fast.ops.rms_norm import add_rms_norm, rms_norm


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


class LayerNorm:
    """Layer norm (Ba et al. 2016) with a learned weight and bias, [hidden] each."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> None:
        self.weight = weight
        self.bias = bias
        self.eps = eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
