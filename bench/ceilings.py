"""Compiles and runs ceilings.cpp: what this machine can read and multiply."""

import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).with_name("ceilings.cpp")


@dataclass(frozen=True)
class Ceilings:
    """GB/s of reads and GOP/s of byte products (`vpdpbusd`), on all threads together."""

    read: float
    int8: float


def measure(threads: int, num_bytes: int) -> Ceilings | str:
    """The ceilings for `num_bytes` of weights, or why they cannot be measured here."""
    if shutil.which("g++") is None:
        return "no g++"
    if "avx512_vnni" not in Path("/proc/cpuinfo").read_text():
        return "the processor has no AVX-512 VNNI"
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "ceilings")
        flags = ["-std=c++20", "-O3", "-march=native", "-pthread"]
        subprocess.run(["g++", *flags, str(SOURCE), "-o", str(program)], check=True)
        out = subprocess.run(
            [program, str(threads), str(num_bytes)], check=True, capture_output=True, text=True
        )
    read, int8 = map(float, out.stdout.split())
    return Ceilings(read, int8)
