"""Reads a compiled kernel: registers, spills, shared memory, and which instructions it is made of."""

import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton

_MATRIX = re.compile(r"\b([HIQO]MMA|[HIQ]GMMA|UTC\w*MMA)\b")
_LOAD = re.compile(r"\b(?:LDG|LDGSTS)(?![A-Z])((?:\.\w+)*)")
_LOCAL = re.compile(r"\b(?:LDL|STL)\b")
# A dot whose result lies in an ordinary layout is made of scalar multiplications.
_SCALAR_DOT = re.compile(r"\btt\.dot\b.*-> tensor<[^>]*#blocked")


@dataclass(frozen=True)
class Resources:
    """What one kernel takes, and what it is made of.

    loads: global loads by width in bits. local_accesses: instructions that read or write spilled registers.
    """

    registers: int  # of a thread
    stack: int  # bytes of a thread
    shared: int  # bytes of a block, static and dynamic
    matrix_instructions: dict[str, int]  # by name, such as HGMMA
    scalar_dots: int
    loads: dict[int, int]
    local_accesses: int

    @property
    def wide_share(self) -> float:
        """The share of loaded bytes that 128-bit loads bring, counting every instruction once."""
        total = sum(width * count for width, count in self.loads.items())
        return self.loads.get(128, 0) * 128 / total if total else 1.0

    @property
    def spills(self) -> bool:
        return bool(self.stack or self.local_accesses)


def read_resources(cubin: Path, shared: int) -> Resources:
    """Of a cubin with one kernel; Triton's intermediate code lies beside it.

    shared: bytes of dynamic shared memory, which only the launch knows.
    """
    listing = _listing(cubin)
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", listing)}
    matrix: Counter[str] = Counter()
    loads: Counter[int] = Counter()
    local = 0
    for line in listing.splitlines():
        if match := _MATRIX.search(line):
            matrix[match[1]] += 1
        if match := _LOAD.search(line):
            loads[_width(match[1])] += 1
        local += _LOCAL.search(line) is not None
    layouts = cubin.with_suffix(".ttgir").read_text()
    return Resources(
        registers=found["REG"],
        stack=found["STACK"] + found["LOCAL"],
        shared=max(found["SHARED"], shared),
        matrix_instructions=dict(matrix),
        scalar_dots=len(_SCALAR_DOT.findall(layouts)),
        loads=dict(loads),
        local_accesses=local,
    )


def _width(modifiers: str) -> int:
    """Bits of a load, from its modifiers: `.E.128`, `.E.U8`; 32 where none says so."""
    widths = [int(digits) for digits in re.findall(r"\.[US]?(8|16|64|128|256)\b", modifiers)]
    return widths[-1] if widths else 32


def _listing(cubin: Path) -> str:
    """Resources and instructions."""
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", str(cubin)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
