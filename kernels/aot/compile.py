"""Compiles the launches of a catalog for one architecture, in no need of a GPU."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from flexjudge_fast.kernels.aot.offline_driver import CompiledVariant, compiling_for
from flexjudge_fast.kernels.catalog import Launch, ModelShape, launches
from flexjudge_fast.kernels.chips import Arch


@dataclass(frozen=True)
class CompiledLaunch:
    """A launch of the catalog and the kernels that it runs, in order."""

    launch: Launch
    variants: tuple[CompiledVariant, ...]


def compile_catalog(arch: Arch, shapes: Iterable[ModelShape], folder: Path) -> Sequence[CompiledLaunch]:
    """Compile whatever `shapes` launch and `arch` can run. Binaries and intermediate code go to `folder`."""
    done = []
    with compiling_for(arch, folder) as launched:
        for launch in (launch for shape in shapes for launch in launches(shape)):
            if launch.needs and launch.needs not in arch.features:
                continue
            before = len(launched)
            launch.run()
            done.append(CompiledLaunch(launch, tuple(launched[before:])))
    return done
