"""Reads a compiled kernel: registers, spills, shared memory, and which instructions it is made of."""

import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton

_TENSOR_CORE = re.compile(r"\b(HMMA|IMMA|QMMA|OMMA|HGMMA|IGMMA|QGMMA|UTC\w*MMA)")
_LOAD = re.compile(r"\b(?:LDG|LDGSTS)(?![A-Z])((?:\.\w+)*)")
_LOCAL = re.compile(r"\b(LDL|STL)\b")


@dataclass(frozen=True)
class Resources:
    """What one kernel takes.

    tensor_core: counts by instruction, such as HGMMA. loads: global loads by width in bits.
    """

    registers: int
    stack: int  # bytes
    local: int  # bytes
    shared: int  # bytes, static and dynamic
    tensor_core: dict[str, int]
    loads: dict[int, int]
    local_accesses: int  # spills and arrays that did not fit in registers


def read_resources(cubin: Path, shared: int) -> Resources:
    """Of a cubin with one kernel. shared: bytes of dynamic shared memory, which only the launch knows."""
    usage = _cuobjdump("-res-usage", cubin)
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    tensor_core: Counter[str] = Counter()
    loads: Counter[int] = Counter()
    local = 0
    for line in _cuobjdump("-sass", cubin).splitlines():
        if match := _TENSOR_CORE.search(line):
            tensor_core[match[1]] += 1
        if match := _LOAD.search(line):
            loads[_width(match[1])] += 1
        local += _LOCAL.search(line) is not None
    return Resources(
        found["REG"],
        found["STACK"],
        found["LOCAL"],
        max(found["SHARED"], shared),
        dict(tensor_core),
        dict(loads),
        local,
    )


def _width(modifiers: str) -> int:
    """Bits of a load, from its modifiers: `.E.128`, `.E.U8`; 32 where none says so."""
    widths = [int(digits) for digits in re.findall(r"\.[US]?(8|16|64|128|256)\b", modifiers)]
    return widths[-1] if widths else 32


def _cuobjdump(option: str, cubin: Path) -> str:
    tool = triton.knobs.nvidia.cuobjdump.path
    return subprocess.run([tool, option, str(cubin)], check=True, capture_output=True, text=True).stdout
