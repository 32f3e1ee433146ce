"""A Triton driver for a GPU that is not there: launches compile for it and then do nothing."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver as triton_driver
from triton.runtime.cache import get_cache_manager

from flexjudge_fast.kernels.chips import Arch


@dataclass(frozen=True)
class CompiledVariant:
    """One compiled kernel. constants: its compile-time arguments; shared: bytes of dynamic shared memory."""

    name: str
    constants: dict[str, Any]
    signature: dict[str, str]
    num_warps: int
    num_stages: int
    shared: int
    cubin: Path

    @property
    def label(self) -> str:
        """The name, the types of pointers and the compile-time constants, for people."""
        types = ",".join(kind[1:] for kind in self.signature.values() if kind.startswith("*"))
        constants = " ".join(f"{name}={value}" for name, value in self.constants.items())
        return f"{self.name}({types}) {constants} num_warps={self.num_warps} num_stages={self.num_stages}"


class _Utils:
    """What Triton asks a device: its limits, and to load a binary."""

    def __init__(self, arch: Arch) -> None:
        self.arch = arch

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": self.arch.max_shared, "multiprocessor_count": 1, "max_num_regs": 65536}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, ...]:
        return (1, 1, 0, 0, 1024)  # module, function, registers, spills, most threads


class OfflineDriver(DriverBase):  # type: ignore[misc]
    """Triton's driver interface for `arch`. Each architecture is a device number of its own, because Triton
    keeps what it compiled by device."""

    def __init__(self, arch: Arch) -> None:
        super().__init__()
        self.arch = arch
        self.utils = _Utils(arch)
        self.launched: list[CompiledVariant] = []

    @classmethod
    def is_active(cls) -> bool:
        return False

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """What Triton calls at each launch of a kernel: notes the launch."""
        variant = _variant(source, metadata)
        return lambda *args: triton_driver.active.launched.append(variant)

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("nothing runs on a device that is not there")

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")

    def get_current_device(self) -> int:
        return self.arch.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_capability(self, device: int) -> tuple[int, int]:
        return divmod(self.arch.capability, 10)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch.capability, 32)


@contextlib.contextmanager
def compiling_for(arch: Arch, folder: Path) -> Iterator[list[CompiledVariant]]:
    """Inside the `with`, kernels that are launched on meta or CPU tensors are compiled into `folder`.

    Triton keeps kernels in memory, too: a process should stay with one folder.

    Yields:
        The variant of each launch so far.

    Raises:
        triton.runtime.errors.OutOfResources: at a launch, if a kernel needs more shared memory than there is.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET=1 is set: kernels are interpreted and cannot be compiled")
    before, previous = triton.knobs.cache.dir, triton_driver._active
    driver = OfflineDriver(arch)
    triton.knobs.cache.dir = str(folder)
    triton_driver.set_active(driver)
    try:
        yield driver.launched
    finally:
        triton_driver.set_active(previous)
        triton.knobs.cache.dir = before


def _variant(source: Any, metadata: Any) -> CompiledVariant:
    names = source.fn.arg_names
    return CompiledVariant(
        metadata.name,
        {names[path[0]]: value for path, value in source.constants.items() if len(path) == 1},
        dict(source.signature),
        metadata.num_warps,
        metadata.num_stages,
        metadata.shared,
        Path(get_cache_manager(metadata.hash).cache_dir) / f"{source.name[:150]}.cubin",
    )
