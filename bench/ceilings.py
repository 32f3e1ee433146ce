"""The machine's ceilings: compiles ceilings.cpp and asks it, between the engines' turns."""

import shutil
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType

import psutil

from bench.engines import MissingError

SOURCE = Path(__file__).with_name("ceilings.cpp")
MEMORY_BYTES = 1 << 30  # reads of as much come from memory, not from caches
KINDS = {"read": "GB/s", "int8": "GOP/s", "bf16": "GFLOP/s", "fp32": "GFLOP/s"}


class Ceilings:
    """A running ceilings program that holds `num_bytes` on huge pages; idle between questions."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = min(num_bytes, psutil.virtual_memory().available // 4)
        self._folder = tempfile.TemporaryDirectory()
        program = Path(self._folder.name, "ceilings")
        _compile(program)
        self._process = subprocess.Popen(
            [program, str(self.num_bytes)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def measure(self, kind: str, threads: int, read_bytes: int | None = None) -> float:
        """GB/s of "read", giga-operations a second of "int8", "bf16" or "fp32".

        read_bytes: how much is read over and over (default: all); a small part comes from caches in part.

        Raises:
            MissingError: the processor or the compiler lacks the instruction, or the program ended.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{kind} {threads} {read_bytes or self.num_bytes}\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline().strip()
        if not line or line.startswith("missing"):
            raise MissingError(line.removeprefix("missing ") or "the ceilings program ended")
        return float(line)

    def close(self) -> None:
        """End the program and give its memory back."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait()
        self._folder.cleanup()

    def __enter__(self) -> "Ceilings":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _compile(program: Path) -> None:
    if shutil.which("g++") is None:
        raise MissingError("no g++ to compile bench/ceilings.cpp")
    flags = ["-std=c++20", "-O3", "-march=native", "-pthread"]
    done = subprocess.run(["g++", *flags, str(SOURCE), "-o", str(program)], capture_output=True, text=True)
    if done.returncode:
        raise MissingError(f"g++ cannot compile bench/ceilings.cpp: {done.stderr.strip().splitlines()[0]}")
