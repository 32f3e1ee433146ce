"""Builds csrc/ into flexjudge_fast/_C.so: a plain shared library that torch loads, no Python in it."""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
CSRC = Path("csrc")  # relative to the working directory, which setuptools asks of sources


class BuildOps(build_ext):
    """Leaves the library out, and says why, where it cannot be built: the torch reference then runs."""

    def run(self) -> None:
        try:
            from torch.utils.cpp_extension import include_paths, library_paths
        except ImportError:
            return self._leave_out("torch is not installed here; install it, then use --no-build-isolation")
        for extension in self.extensions:
            extension.include_dirs += [str(ROOT / "csrc" / "include"), *include_paths()]
            extension.library_dirs += library_paths()
        try:
            super().run()
        except Exception as error:  # no compiler, or one that is too old
            self._leave_out(str(error))

    def build_extension(self, ext: Extension) -> None:
        """As setuptools does, but the files are compiled side by side, and not again if none has changed."""
        built, target = ROOT / self.get_ext_filename(ext.name), Path(self.get_ext_fullpath(ext.name))
        inputs = [Path(name) for name in (*ext.sources, *ext.depends, "setup.py")]
        if built.exists() and max(path.stat().st_mtime for path in inputs) < built.stat().st_mtime:
            if target.resolve() != built.resolve():
                self.mkpath(str(target.parent))
                self.copy_file(str(built), str(target))
            return
        compile_some = self.compiler.compile

        def compile_all(sources: list[str], *args: object, **kwargs: object) -> list[str]:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = pool.map(lambda source: compile_some([source], *args, **kwargs), sources)
                return [name for found in objects for name in found]

        self.compiler.compile = compile_all
        super().build_extension(ext)

    def _leave_out(self, reason: str) -> None:
        self.extensions.clear()
        print(f"flexjudge_fast: compiled CPU ops left out: {reason}", file=sys.stderr)

    def get_ext_filename(self, name: str) -> str:
        return name.replace(".", "/") + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []


setup(
    ext_modules=[
        Extension(
            "flexjudge_fast._C",
            sources=sorted(map(str, [*CSRC.glob("cpu/**/*.cpp"), *CSRC.glob("bindings/*.cpp")])),
            depends=sorted(map(str, CSRC.rglob("*.h"))),
            define_macros=[("TORCH_TARGET_VERSION", "0x020B000000000000")],  # the stable ABI of torch 2.11
            extra_compile_args=[
                "-std=c++20",
                "-O3",
                "-g0",  # debug information of the kernels takes longer than the kernels
                "-ffp-contract=off",
                "-fvisibility=hidden",
                "-Wall",
                "-Wextra",
                "-Wno-psabi",  # 64-byte vectors between our own functions
                "-Wno-uninitialized",  # GCC 12 warns in its own AVX-512 header
                "-Wno-maybe-uninitialized",
                "-Wno-unused-parameter",  # in torch's headers
                "-pthread",
            ],
            libraries=["torch_cpu"],  # already loaded by torch when ours is: no run path needed
            language="c++",
        )
    ],
    cmdclass={"build_ext": BuildOps},
)
