"""Kernels compiled with no GPU: fit for every architecture, and loaded from a bundle without compiling."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TINY = """
import dataclasses, sys
from pathlib import Path
import torch, triton
from flexjudge_fast.errors import KernelBundleError
from flexjudge_fast.kernels.aot.compile import compile_catalog
from flexjudge_fast.kernels.aot.offline_driver import compiling_for
from flexjudge_fast.kernels.bundle import claim_folder, use_bundle, write_bundle
from flexjudge_fast.kernels.catalog import ModelShape, launches
from flexjudge_fast.kernels.chips import find_arch

arch, folder = find_arch("sm_90"), Path(sys.argv[1])
shape = ModelShape(256, 4, 2, 64, 512, 1000, 16, 160, 2, 80, 256)
"""
BUILD = (
    TINY
    + """
compiled = compile_catalog(arch, [shape], folder / "work")
variants = [variant for part in compiled for variant in part.variants]
claim_folder(folder / "bundle")
manifest = write_bundle(folder / "bundle", arch.capability, variants)
print(len(manifest.kernels))
"""
)
LOAD = (
    TINY
    + """
compiled = []
triton.knobs.compilation.listener = lambda *, src, cache_hit, **_: compiled.append((src.name, cache_hit))
with compiling_for(find_arch(sys.argv[2]), folder / "nothing"):
    try:
        use_bundle(folder / "bundle")
    except KernelBundleError as error:
        sys.exit(str(error))
    for launch in launches(shape):
        launch.run()
print(len(compiled), [name for name, cache_hit in compiled if not cache_hit])
"""
)


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs `code` where kernels are compiled, not interpreted."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = [sys.executable, "-c", code, *arguments]
    return subprocess.run(run, capture_output=True, text=True, env=env, timeout=500, check=False)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("aot")
    done = python(BUILD, str(folder))
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 10
    return folder


def test_a_bundle_loads_without_compiling(bundle: Path) -> None:
    done = python(LOAD, str(bundle), "sm_90")
    assert done.returncode == 0, done.stderr
    number, missing = done.stdout.split(maxsplit=1)
    assert int(number) > 10 and missing.strip() == "[]"


def test_a_bundle_for_another_architecture_is_refused(bundle: Path) -> None:
    done = python(LOAD, str(bundle), "sm_80")
    assert done.returncode == 1 and "made for architecture 90, here is 80" in done.stderr


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("source", "0" * 64, "made for source of the kernels 000"),
        ("triton", "1.0", "made for Triton 1.0"),
        ("format", 0, "made for layout 0"),
        ("kernels", 3, "not a bundle of kernels"),
        ("kernel", [], "not a bundle of kernels"),
    ],
)
def test_a_bundle_of_other_kernels_is_refused(
    bundle: Path, tmp_path: Path, field: str, value: object, message: str
) -> None:
    manifest = json.loads((bundle / "bundle" / "manifest.json").read_text())
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "manifest.json").write_text(json.dumps({**manifest, field: value}))
    done = python(LOAD, str(tmp_path), "sm_90")
    assert done.returncode == 1 and message in done.stderr, done.stderr


def test_the_command_refuses_a_folder_with_files(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    arguments = "import sys; from flexjudge_fast.kernels.__main__ import main; sys.exit(main(sys.argv[1:]))"
    done = python(arguments, "build", str(tmp_path), "--arch", "sm_80")
    assert done.returncode == 1 and "it is not empty" in done.stderr
    assert (tmp_path / "mine.txt").exists()


REPORT = """
import importlib, sys
from pathlib import Path
import torch
from flexjudge_fast.kernels.aot import compile
from flexjudge_fast.kernels.aot.report import faults, measure
from flexjudge_fast.kernels.catalog import ModelShape
from flexjudge_fast.kernels.chips import find_arch

folder, arch, part, weights, kv_dtype = sys.argv[1:]
arch = find_arch(arch)
compile.launches = importlib.import_module(f"flexjudge_fast.kernels.catalog_{part}").launches
shape = ModelShape(weights=weights, kv_dtype=getattr(torch, kv_dtype))
compiled = compile.compile_catalog(arch, [shape], Path(folder))
assert compiled
for variant, resources in measure(compiled):
    for fault in faults(resources, arch):
        print(f"{variant.label}: {fault}")
"""


# `make kernels` compiles everything for every architecture; here is a part for each.
CASES = [
    ("sm_80", "attention", "bf16", "bfloat16"),
    ("sm_86", "linear", "bf16", "bfloat16"),
    ("sm_89", "small", "bf16", "bfloat16"),
    ("sm_90", "linear", "w4a16-g128", "bfloat16"),
    ("sm_100", "attention", "bf16", "float8_e4m3fn"),
    ("sm_120", "linear", "int8", "bfloat16"),
]


@pytest.mark.parametrize(("arch", "part", "weights", "kv_dtype"), CASES)
def test_kernels_of_a_7b_judge_fit(arch: str, part: str, weights: str, kv_dtype: str, tmp_path: Path) -> None:
    """All compile; no spills, no local memory; shared memory within the limit; dots on the tensor cores."""
    done = python(REPORT, str(tmp_path), arch, part, weights, kv_dtype)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
