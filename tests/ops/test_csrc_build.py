"""The C++ sources by themselves: under sanitizers, as shipped, and on a machine without a compiler."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SANITIZED = ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
THREADS = ["-O1", "-g1", "-fsanitize=thread"]


EMULATED = ["-O1", "-Wno-uninitialized", "-Wno-maybe-uninitialized", "-mavx2", "-mfma", "-mf16c"]
EMULATED += ["-DFJ_EMULATED", "-DFJ_INLINE=inline", "-DFJ_TWIN=kernels_avx2"]


def find_compiler() -> str:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("there is no C++ compiler here")
    return compiler


def run_standalone(test: str, sources: list[str], flags: list[str], folder: Path) -> None:
    """Compile csrc/tests/`test`.cpp with `sources` of csrc/cpu and run it."""
    compiler = find_compiler()
    files = [ROOT / f"csrc/tests/{test}.cpp", *(ROOT / "csrc/cpu" / name for name in sources)]
    common = ["-std=c++20", "-ffp-contract=off", "-Wall", "-Wextra", "-Wno-psabi", "-Werror", "-pthread"]
    command = [compiler, *common, f"-I{ROOT / 'csrc/include'}", *flags, *files, "-o", folder / test]
    subprocess.run(command, check=True)
    done = subprocess.run([folder / test], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr


@pytest.mark.parametrize("flags", [SANITIZED, ["-O3"]], ids=["sanitized", "shipped"])
def test_dequantize(flags, tmp_path):
    """`-O3` runs the build for this machine's instruction set, the sanitized one the plain build."""
    run_standalone("test_dequantize", ["dequantize.cpp", "quantize.cpp"], flags, tmp_path)


@pytest.mark.parametrize("flags", [SANITIZED, THREADS, ["-O3"]], ids=["sanitized", "threads", "shipped"])
def test_image(flags, tmp_path):
    """Frames of every odd size, resized and cut into patches."""
    run_standalone("test_image", ["image.cpp", "thread_pool.cpp"], flags, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [SANITIZED, THREADS], ids=["sanitized", "threads"])
def test_kernels(flags, tmp_path):
    """The scalar kernels and the thread pool: memory and arithmetic, then races."""
    run_standalone("test_kernels", ["pack.cpp", "thread_pool.cpp", "isa/scalar.cpp"], flags, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["avx512_vnni", "avx512_bf16"])
def test_emulated_kernels(isa, tmp_path):
    """The AVX-512 builds on a processor with AVX2: accurate, and its bits unless they round activations."""
    if platform.machine() != "x86_64" or not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        pytest.skip("the emulation needs an x86-64 processor with AVX2")
    header = ["-x", "c++", "-fsyntax-only", "-include", "simde/x86/avx512.h", os.devnull]
    if subprocess.run([find_compiler(), *header], capture_output=True, check=False).returncode != 0:
        pytest.skip("SIMDe's headers are not installed: apt-get install libsimde-dev")
    sources = ["pack.cpp", "thread_pool.cpp", "isa/avx2.cpp", f"isa/{isa}.cpp"]
    run_standalone("test_kernels", sources, [f"-DFJ_TESTED=kernels_{isa}", *EMULATED], tmp_path)


def build_elsewhere(folder: Path) -> str:
    """Builds a copy of the sources in `folder` where no compiler works; gives what was printed."""
    no_compiler = {**os.environ, "CC": "/bin/false", "CXX": "/bin/false"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", "built"]
    done = subprocess.run(command, cwd=folder, env=no_compiler, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.fixture
def sources(tmp_path):
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / "flexjudge_fast").mkdir()
    (tmp_path / "flexjudge_fast" / "__init__.py").touch()
    return tmp_path


def test_build_without_a_compiler(sources):
    """The library is left out, the reason printed, and the build goes on."""
    assert "compiled CPU ops left out" in build_elsewhere(sources)
    assert not list(sources.rglob("*.so"))


def test_what_is_built_is_not_built_again(sources):
    """`make test` behind `make judge`; until a source changes."""
    (sources / "flexjudge_fast" / "_C.so").write_text("built")
    assert build_elsewhere(sources) == ""
    assert (sources / "built" / "flexjudge_fast" / "_C.so").read_text() == "built"
    changed = sources / "csrc" / "cpu" / "thread_pool.cpp"
    later = (sources / "flexjudge_fast" / "_C.so").stat().st_mtime + 1
    os.utime(changed, (later, later))
    assert "compiled CPU ops left out" in build_elsewhere(sources)
