"""Tile sizes of the kernels: data in tile_tables/, looked up by kernel, case and architecture."""

import functools
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flexjudge_fast.kernels.chips import capability


def tiles(kernel: str, case: str = "") -> dict[str, int]:
    """Constants for a launch on the current device, such as BLOCK_M, num_warps and num_stages.

    What is closest wins, field by field: "default", then `case`, then the architecture (`sm_90`, or
    `interpreter`), then the architecture's `case`. An architecture that the table lacks takes the nearest
    lower one. So the choice depends on nothing but the arguments and the device.

    Raises:
        KeyError: the table has no such kernel.
    """
    return dict(_choose(kernel, case, capability()))


def cdiv(a: int, b: int) -> int:
    """`a` over `b`, rounded up. Triton's own does the same for its compiler and takes 10 us."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least that is not below `n`, which is positive."""
    return 1 << (n - 1).bit_length()


@functools.cache
def _choose(kernel: str, case: str, arch: int) -> Mapping[str, int]:
    table = _tables()[kernel]
    chosen: dict[str, int] = {}
    for level in (table["default"], *_archs(table, arch)):
        for part in (level, level.get(case, {}) if case else {}):
            chosen |= {name: value for name, value in part.items() if isinstance(value, int)}
    return chosen


def _archs(table: Mapping[str, Any], arch: int) -> list[Mapping[str, Any]]:
    """What the table says for this architecture: nothing, or one level."""
    if arch == 0:
        return [table["interpreter"]] if "interpreter" in table else []
    known = [int(name[3:]) for name in table if name.startswith("sm_")]
    lower = [number for number in known if number <= arch]
    return [table[f"sm_{max(lower)}"]] if lower else []


@functools.cache
def _tables() -> dict[str, Any]:
    tables: dict[str, Any] = {}
    for path in sorted((Path(__file__).parent / "tile_tables").glob("*.toml")):
        tables |= tomllib.loads(path.read_text())
    return tables
