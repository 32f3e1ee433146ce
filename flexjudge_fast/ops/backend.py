"""Finds the compiled ops, and says once when they are missing."""

import contextlib
import functools
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch


def uses_triton(x: torch.Tensor) -> bool:
    """Whether an op runs its Triton kernel on this tensor: on a GPU, unless the environment says otherwise.

    `FLEXJUDGE_BACKEND=triton` runs the kernels wherever a tensor is (in Triton's interpreter, under
    TRITON_INTERPRET=1), `FLEXJUDGE_BACKEND=reference` nowhere.
    """
    forced = os.environ.get("FLEXJUDGE_BACKEND")
    return forced == "triton" or (x.is_cuda and forced != "reference")


def has_compiled_ops() -> bool:
    """Whether `torch.ops.flexjudge` is there, and wanted.

    `FLEXJUDGE_BACKEND` "reference" leaves it out, so that everything runs in plain torch, and "triton".
    """
    return os.environ.get("FLEXJUDGE_BACKEND") not in ("reference", "triton") and _load_compiled_ops()


@functools.cache
def _load_compiled_ops() -> bool:
    found = sorted(Path(__file__).parent.parent.glob("_C*.so"))
    try:
        torch.ops.load_library(str(found[0]))
    except (IndexError, OSError) as error:
        reason = "it was not built" if not found else str(error)
        warnings.warn(
            f"flexjudge_fast's compiled CPU ops are missing ({reason}); the slower torch reference is used. "
            "Install with a C++ compiler and `pip install --no-build-isolation` to build them.",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


@contextlib.contextmanager
def one_torch_thread() -> Iterator[None]:
    """Keeps torch's own ops on the calling thread, inside the `with`.

    OpenMP's threads spin for milliseconds after each parallel region and would take the cores from the
    kernels' threads: on two cores a decode step of SmolLM2 took three times as long.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def upload(x: torch.Tensor, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A tensor of the host on `device`, without waiting for what is queued there."""
    x = x.to(dtype or x.dtype)
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def isa(device: torch.device) -> str:
    """The instruction set whose kernels run there, or "reference" for plain torch."""
    if uses_triton(torch.empty(0, device=device)):
        from flexjudge_fast.kernels.chips import capability

        return f"triton sm_{capability()}" if capability() else "triton, interpreted"
    return str(torch.ops.flexjudge.isa()) if has_compiled_ops() else "reference"


def use_kernel_bundle(folder: Path) -> None:
    """Take Triton's kernels from a folder, in this process, before any is compiled.

    Raises:
        KernelBundleError: it was made for another GPU, or another version of the kernels.
    """
    from flexjudge_fast.kernels.bundle import use_bundle

    use_bundle(folder)
