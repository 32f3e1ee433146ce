"""What kernels and reports must know about each GPU architecture: limits of a block, and datasheet speeds."""

import functools
from dataclasses import dataclass
from typing import Any

import triton


@dataclass(frozen=True)
class Arch:
    """Limits of a multiprocessor, sizes in bytes (CUDA C++ Programming Guide, "Compute Capabilities")."""

    name: str
    capability: int
    max_shared: int  # of one block
    sm_shared: int  # of all blocks on a multiprocessor, 1 KiB of which each block gives up
    max_threads: int  # resident on a multiprocessor
    tensor_core: str  # pattern of its best matrix instructions' names
    features: frozenset[str] = frozenset()
    registers: int = 65536


# Of a warp, of a group of four, and of Blackwell's tensor memory; the letter is the operands' type.
# Of integers there is none for tensor memory in what Triton makes: they stay with the warp's.
_WARP, _WARP_GROUP, _TENSOR_MEMORY = r"[HIQO]MMA", r"[HIQ]GMMA", r"UTC\w*MMA|IMMA"
ARCHS = (
    Arch("sm_80", 80, 166912, 167936, 2048, _WARP),
    Arch("sm_86", 86, 101376, 102400, 1536, _WARP),
    Arch("sm_89", 89, 101376, 102400, 1536, _WARP, frozenset(["fp8"])),
    Arch("sm_90", 90, 232448, 233472, 2048, _WARP_GROUP, frozenset(["fp8"])),
    Arch("sm_100", 100, 232448, 233472, 2048, _TENSOR_MEMORY, frozenset(["fp8"])),
    Arch("sm_120", 120, 101376, 102400, 1536, _WARP, frozenset(["fp8"])),
)
INTERPRETER = 0  # stands for a capability where Triton interprets


@dataclass(frozen=True)
class Chip:
    """A card's datasheet: bytes and dense operations per second."""

    name: str
    arch: str
    bandwidth: float
    bf16_flops: float
    int8_ops: float
    fp8_flops: float  # 0 where the chip has none


CHIPS = (
    Chip("A100 80GB SXM", "sm_80", 2039e9, 312e12, 624e12, 0),
    Chip("H100 SXM", "sm_90", 3350e9, 989e12, 1979e12, 1979e12),
    Chip("L4", "sm_89", 300e9, 121e12, 242e12, 242e12),
    Chip("RTX 4090", "sm_89", 1008e9, 165.2e12, 660.6e12, 660.6e12),
)


def arch_of(capability: int) -> Arch:
    """The newest of them that a device of this capability runs."""
    return max((arch for arch in ARCHS if arch.capability <= capability), key=lambda arch: arch.capability)


def find_arch(name: str) -> Arch:
    """The architecture of this name. Raises ValueError, which lists those that are known."""
    for arch in ARCHS:
        if arch.name == name:
            return arch
    raise ValueError(f"{name!r}: known architectures are {', '.join(arch.name for arch in ARCHS)}")


def capability() -> int:
    """Of the device that Triton launches on: 90 for sm_90; `INTERPRETER` under TRITON_INTERPRET=1."""
    if triton.knobs.runtime.interpret:
        return INTERPRETER
    driver = triton.runtime.driver.active
    return _capability(driver, driver.get_current_device())


@functools.cache
def _capability(driver: Any, device: int) -> int:
    """Of the driver's current device, which is number `device`."""
    return int(driver.get_current_target().arch)
