"""The gated activation of Llama and Qwen2 MLPs, alone and fused with quantisation by token."""

import torch
import torch.nn.functional as F  # noqa: N812

from flexjudge_fast.ops.backend import uses_triton
from flexjudge_fast.ops.linear_w8a8 import quantize_tokens_reference


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up` (Shazeer 2020, eq. 6).

    Args:
        gate_up: [num_tokens, 2 * intermediate], gate first.

    Returns:
        [num_tokens, intermediate].
    """
    if uses_triton(gate_up):
        from flexjudge_fast.kernels.swiglu import swiglu as kernel

        return kernel(gate_up)
    return swiglu_reference(gate_up)


def swiglu_reference(gate_up: torch.Tensor) -> torch.Tensor:
    """The same in plain torch, which rounds `silu(gate)` to the dtype, too."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def swiglu_quantized(gate_up: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """`swiglu`, each token quantised as `quantize_tokens` does it.

    Args:
        dtype: int8 or float8_e4m3fn.

    Returns:
        Codes [num_tokens, intermediate] in `dtype`; float32 scales [num_tokens].
    """
    if uses_triton(gate_up):
        from flexjudge_fast.kernels.swiglu import swiglu_quantized as kernel

        return kernel(gate_up, dtype)
    return quantize_tokens_reference(swiglu_reference(gate_up), dtype)
