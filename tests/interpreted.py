"""Helpers for tests that run kernels in Triton's interpreter."""

import os
from collections import Counter
from collections.abc import Mapping

import pytest
import torch
import triton
import triton.language as tl

SWEEP = int(os.environ.get("FLEXJUDGE_SWEEP", "1"))  # times as many cases


def patch_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spares most of the interpreter's time: at each call of a function in a kernel it patches the language
    again. Once is enough: the kernel's own is patched at its launch, that of Triton's functions stays so."""
    if not triton.knobs.runtime.interpret:
        return
    from triton.runtime.interpreter import InterpretedFunction

    patch_and_call = InterpretedFunction.__call__

    def call(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        if tl.core.is_builtin(tl.core.load):  # not patched
            return patch_and_call(self, *args, **kwargs)
        return self.rewrite()(*args, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "__call__", call)


def add_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the interpreter's dot add along K in order, as BLAS, which it uses, sums differently by shape."""
    if not triton.knobs.runtime.interpret:
        pytest.skip("about the interpreter's dot")
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def dot(self, a, b, d, input_precision, max_num_imprecise_acc):  # type: ignore[no-untyped-def]
        out = d.data.copy()
        for k in range(a.data.shape[1]):
            out += a.data[:, k : k + 1].astype(out.dtype) * b.data[k : k + 1].astype(out.dtype)
        return TensorHandle(out, d.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)


def count_loads(monkeypatch: pytest.MonkeyPatch, tensors: Mapping[str, torch.Tensor]) -> Counter[str]:
    """Counts from here on the bytes that kernels load from each of these tensors; others are "elsewhere"."""
    if not triton.knobs.runtime.interpret:
        pytest.skip("counts in the interpreter")
    from triton.runtime.interpreter import InterpreterBuilder

    counts: Counter[str] = Counter()
    load = InterpreterBuilder.create_masked_load

    def counting(self, ptrs, mask, *rest):  # type: ignore[no-untyped-def]
        size = ptrs.get_element_ty().primitive_bitwidth // 8
        addresses = ptrs.data[mask.data]
        left = addresses.size
        for name, tensor in tensors.items():
            start = tensor.data_ptr()
            inside = int(((addresses >= start) & (addresses < start + tensor.nbytes)).sum())
            counts[name] += size * inside
            left -= inside
        counts["elsewhere"] += size * left
        return load(self, ptrs, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counting)
    return counts


def in_nan(values: torch.Tensor, device: str = "cpu") -> torch.Tensor:
    """The same tensor at the start of a longer one, whose rest is NaN (or the largest integer)."""
    rest = torch.nan if values.dtype.is_floating_point else torch.iinfo(values.dtype).max
    buffer = torch.full((values.numel() + 4096,), rest, device=device).to(values.dtype)
    buffer[: values.numel()] = values.flatten()
    return buffer[: values.numel()].view(values.shape)


def rows_close(out: torch.Tensor, expected: torch.Tensor, bar: float) -> bool:
    """Whether errors are within `bar` of the largest magnitude of their row (of the last dimension)."""
    if not out.numel():
        return out.shape == expected.shape
    error = (out.double() - expected).abs()
    return bool((error <= bar * expected.abs().amax(-1, keepdim=True) + 1e-7).all())
