"""Matrix products of 8-bit weights with 8-bit activations: int8, or float8 (e4m3)."""

from dataclasses import dataclass

import torch

from flexjudge_fast.ops.backend import uses_triton

_LIMITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}  # the largest code
_LEAST = 1e-30  # rows whose values are all smaller count as zero: limit / amax must be finite


@dataclass(frozen=True, eq=False)
class W8Matrix:
    """A matrix [out_features, in_features]: codes in int8 or float8_e4m3fn, float32 scales [out_features]."""

    codes: torch.Tensor
    scales: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.codes.shape)

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    def is_finite(self) -> bool:
        """No NaN or infinity anywhere; float8_e4m3fn has a NaN."""
        return bool(torch.isfinite(self.scales).all()) and not bool(self.codes.float().isnan().any())

    def to_dense(self, dtype: torch.dtype) -> torch.Tensor:
        """[out_features, in_features] in `dtype`."""
        return dequantize_w8(self).to(dtype)

    def to(self, device: torch.device) -> "W8Matrix":
        return W8Matrix(self.codes.to(device), self.scales.to(device))


@dataclass(frozen=True, eq=False)
class QuantizedTokens:
    """Activations [num_tokens, columns], quantised for a product with a `W8Matrix`; in a model of `dtype`."""

    codes: torch.Tensor  # int8 or float8_e4m3fn
    scales: torch.Tensor  # float32 [num_tokens]
    dtype: torch.dtype


def has_w8a8(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there are kernels for products of int8 or float8_e4m3fn: on GPUs, where they have the type."""
    if not uses_triton(torch.empty(0, device=device)):
        return False
    from flexjudge_fast.kernels.quantize_tokens import check_float8

    try:
        check_float8(dtype)
    except ValueError:
        return False
    return True


def quantize_tokens(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise each token by its largest magnitude.

    Args:
        x: [num_tokens, columns], any float dtype.
        dtype: int8 or float8_e4m3fn.

    Returns:
        Codes [num_tokens, columns] in `dtype`; float32 scales [num_tokens], 0 for a row of zeros,
        NaN (and codes of 0) for one that holds NaN or infinity.

    Raises:
        ValueError: float8 on a GPU that has none.
    """
    if uses_triton(x):
        from flexjudge_fast.kernels.quantize_tokens import quantize_tokens as kernel

        return kernel(x, dtype)
    return quantize_tokens_reference(x, dtype)


def quantize_tokens_reference(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in plain torch. Each step is rounded to float32, and codes half to even: kernels that quantise
    as they go repeat this to the bit."""
    limit = torch.tensor(_LIMITS[dtype], dtype=torch.float32, device=x.device)
    wide = x.float()
    amax = wide.abs().amax(dim=1, keepdim=True) if x.shape[1] else wide.new_zeros(x.shape[0], 1)
    amax = torch.where(amax < _LEAST, 0.0, amax)
    factor = torch.where(amax > 0, limit / amax, 0.0)  # 0 for infinity and NaN
    scaled = (wide * factor).nan_to_num().clamp(-limit, limit)
    rounded = scaled.round() if dtype == torch.int8 else scaled.to(dtype).float()
    codes = (rounded + 0.0).to(dtype)  # no negative zeros
    return codes, torch.where(amax.isfinite(), amax / limit, torch.nan).squeeze(1)


def repack_w8(weight: torch.Tensor, dtype: torch.dtype) -> W8Matrix:
    """Quantise a dense weight [out_features, in_features], each row by its largest magnitude."""
    parts = [quantize_tokens_reference(rows, dtype) for rows in weight.split(4096)]
    codes, scales = zip(*parts, strict=True)
    return W8Matrix(torch.cat(codes), torch.cat(scales))


def dequantize_w8(weight: W8Matrix) -> torch.Tensor:
    """float32 [out_features, in_features]."""
    return weight.codes.float() * weight.scales.unsqueeze(1)


def linear_w8a8(
    codes: torch.Tensor,
    scales: torch.Tensor,
    weight: W8Matrix,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """`(codes * scales) @ dequantize_w8(weight).T + bias`.

    Sums of int8 are exact, those of float8 are float32; then come the token's scale, the row's, and the bias,
    in float32.

    Args:
        codes: [num_tokens, in_features], dtype of the weight's codes.
        scales: float32 [num_tokens]. Both are what `quantize_tokens` returns.
        bias: [out_features], any float dtype.
        dtype: of the result.

    Returns:
        [num_tokens, out_features].

    Raises:
        ValueError: float8 on a GPU that has none.
    """
    if uses_triton(codes):
        from flexjudge_fast.kernels.linear_w8a8 import linear_w8a8 as kernel

        return kernel(codes, scales, weight.codes, weight.scales, bias, dtype)
    return linear_w8a8_reference(codes, scales, weight, bias, dtype)


def linear_w8a8_reference(
    codes: torch.Tensor,
    scales: torch.Tensor,
    weight: W8Matrix,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """The same in plain torch; float64 where the result is."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    out = (codes.double() @ weight.codes.double().T).to(wide)
    out = out * scales.to(wide).unsqueeze(1) * weight.scales.to(wide)
    return (out if bias is None else out + bias.to(wide)).to(dtype)
