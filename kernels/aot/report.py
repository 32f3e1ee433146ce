"""Writes docs/kernels.md: what compiled kernels take on every architecture, and the bounds of their time."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import triton

from flexjudge_fast.kernels.aot.compile import CompiledLaunch
from flexjudge_fast.kernels.aot.offline_driver import CompiledVariant
from flexjudge_fast.kernels.aot.sass import Resources, read_resources
from flexjudge_fast.kernels.catalog import Launch
from flexjudge_fast.kernels.chips import CHIPS, Arch, Chip

_HEAD = """# Kernels

Written by `make kernels` from what Triton {version} compiles, with no GPU at hand. **Nothing here is a
measurement**: registers, shared memory and instructions are counted in the binaries, bytes and operations
by arithmetic, and times are the bounds that follow from the cards' datasheets. `bench/gpu.py` measures, on
the day a GPU is there.
"""
_VARIANTS = """
## What the kernels take

At the sizes of a 7B judge. One line for each kernel, its constants and its tiles. "blocks" is how many fit
on a multiprocessor at once, and what bounds them; "matrix" counts instructions of the tensor cores; "wide"
is the share of loaded bytes that 128-bit loads bring, each instruction counted once.
"""
_BOUNDS = """
## Bounds of time

The least time of a launch by a card's datasheet: bytes moved over bandwidth, or operations over peak; "B"
where bytes bound it, "F" where operations do. "excess" is bytes moved over the least possible.
"""


def write_report(
    path: Path, compiled: Mapping[Arch, Sequence[CompiledLaunch]], launches: Iterable[Launch]
) -> list[str]:
    """Write the report to `path`.

    Args:
        compiled: what each architecture's table lists.
        launches: whose bounds of time are listed.

    Returns:
        What breaks a rule (spills, shared memory, dots beside the tensor cores); empty when all is well.
    """
    lines = [_HEAD.format(version=triton.__version__), _VARIANTS]
    wrong: list[str] = []
    for arch, parts in compiled.items():
        lines += [
            f"\n### {arch.name}\n",
            "| kernel | registers | spills | shared KiB | blocks | matrix | wide |",
            "|---|---:|---:|---:|---|---|---:|",
        ]
        for variant, resources in measure(parts):
            lines.append(_variant_line(variant, resources, arch))
            wrong += [f"{arch.name}: {variant.label}: {what}" for what in faults(resources, arch)]
    lines += [_BOUNDS, *_bounds_table(launches)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return wrong


def measure(launches: Iterable[CompiledLaunch]) -> list[tuple[CompiledVariant, Resources]]:
    """Each variant once, in order of names."""
    distinct = {variant.cubin: variant for part in launches for variant in part.variants}
    variants = sorted(distinct.values(), key=lambda variant: variant.label)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # each waits for a tool
        return list(
            zip(variants, pool.map(lambda v: read_resources(v.cubin, v.shared), variants), strict=True)
        )


def faults(resources: Resources, arch: Arch) -> list[str]:
    """The rules that a variant breaks."""
    found = []
    if resources.spills:
        found.append(f"spills: stack {resources.stack}, {resources.local_accesses} accesses")
    if resources.shared > arch.max_shared:
        found.append(f"shared memory {resources.shared} of {arch.max_shared}")
    if resources.scalar_dots:
        found.append(f"{resources.scalar_dots} dots without tensor cores")
    slow = [name for name in resources.matrix_instructions if not re.fullmatch(arch.tensor_core, name)]
    if slow:
        found.append(f"{', '.join(slow)} instead of {arch.tensor_core}")
    return found


def blocks_per_sm(resources: Resources, num_warps: int, arch: Arch) -> tuple[int, str]:
    """How many blocks fit on a multiprocessor, and what bounds them."""
    registers = -(-resources.registers // 8) * 8 * 32 * num_warps  # given out by eights, for each warp
    bounds = {
        "registers": arch.registers // registers,
        "shared": arch.sm_shared // (resources.shared + 1024),
        "threads": arch.max_threads // (32 * num_warps),
    }
    tightest = min(bounds, key=lambda name: bounds[name])
    return bounds[tightest], tightest


def bound_seconds(launch: Launch, chip: Chip) -> tuple[float, str]:
    """The least time of a launch, and whether bytes ("B") or operations ("F") set it."""
    peaks = {"int8": chip.int8_ops, "fp8": chip.fp8_flops}
    operands = next(
        (name for name in peaks if launch.kernel.startswith("linear") and name in launch.case), ""
    )
    by_bytes = launch.moved_bytes / chip.bandwidth
    by_flops = launch.flops / (peaks.get(operands) or chip.bf16_flops)
    return (by_bytes, "B") if by_bytes >= by_flops else (by_flops, "F")


def _variant_line(variant: CompiledVariant, resources: Resources, arch: Arch) -> str:
    blocks, bound = blocks_per_sm(resources, variant.num_warps, arch)
    matrix = ", ".join(f"{n} {name}" for name, n in sorted(resources.matrix_instructions.items())) or "–"
    return (
        f"| {variant.label} | {resources.registers} | {resources.local_accesses} | "
        f"{resources.shared / 1024:.1f} | {blocks}, {bound} | {matrix} | {resources.wide_share:.0%} |"
    )


def _bounds_table(launches: Iterable[Launch]) -> list[str]:
    names = " | ".join(f"{chip.name} µs" for chip in CHIPS)
    lines = [
        f"| kernel | case | tokens | bytes per token | excess | flops per token | {names} |",
        "|---|---|---:|---:|---:|---:|" + "---:|" * len(CHIPS),
    ]
    for launch in launches:
        bounds = (bound_seconds(launch, chip) for chip in CHIPS)
        times = " | ".join(f"{1e6 * seconds:.1f} {kind}" for seconds, kind in bounds)
        excess = launch.moved_bytes / launch.num_bytes
        each = (launch.moved_bytes / launch.tokens, launch.flops / launch.tokens)
        lines.append(
            f"| {launch.kernel} | {launch.case} | {launch.tokens} | {each[0]:,.0f} | {excess:.3f} | "
            f"{each[1]:,.0f} | {times} |"
        )
    return lines
