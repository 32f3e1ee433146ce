"""Kernels compiled ahead of time: a folder that is written on any machine and loaded without compiling.

`manifest.json` says what the folder was made for; each kernel has a folder named by Triton's own cache key
(its source, constants, Triton's version, architecture), with its binary and its launch data. Binaries run on
the GPU as they are: a bundle is to be trusted like a program.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.runtime.cache import FileCacheManager

from flexjudge_fast.errors import KernelBundleError
from flexjudge_fast.kernels.aot.offline_driver import CompiledVariant
from flexjudge_fast.kernels.chips import capability

_FORMAT = 1


@dataclass(frozen=True)
class Manifest:
    """What a bundle was made for. source: digest of the kernels' sources and tile tables."""

    format: int
    arch: int
    triton: str
    source: str
    kernels: tuple[str, ...]


def source_digest() -> str:
    """SHA-256 over the kernels' sources and tile tables, names included."""
    digest = hashlib.sha256()
    root = Path(__file__).parent
    for path in sorted([*root.rglob("*.py"), *root.rglob("*.toml")]):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def claim_folder(folder: Path) -> None:
    """Make `folder`. Raises KernelBundleError if anything is in it."""
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise KernelBundleError(f"{folder}: it is not empty")


def write_bundle(folder: Path, arch: int, variants: Iterable[CompiledVariant]) -> Manifest:
    """Copy the variants' binaries and launch data to `folder`, as `claim_folder` left it."""
    labels = []
    for variant in {variant.cubin: variant for variant in variants}.values():
        target = folder / variant.cubin.parent.name
        target.mkdir()
        for path in (variant.cubin, variant.cubin.with_suffix(".json")):
            shutil.copyfile(path, target / path.name)
        labels.append(variant.label)
    manifest = Manifest(_FORMAT, arch, triton.__version__, source_digest(), tuple(sorted(labels)))
    text = json.dumps(asdict(manifest), indent=1)
    (folder / "manifest.json").write_text(text, encoding="utf-8")  # last: without it there is no bundle
    return manifest


def use_bundle(folder: Path) -> Manifest:
    """Let Triton take kernels from `folder`, in this process, before it compiles any.

    Raises:
        KernelBundleError: the bundle does not fit this device, this Triton, or these kernels.
    """
    manifest = _read_manifest(folder / "manifest.json")
    for what, made_for, here in (
        ("layout", manifest.format, _FORMAT),
        ("architecture", manifest.arch, capability()),
        ("Triton", manifest.triton, triton.__version__),
        ("source of the kernels", manifest.source, source_digest()),
    ):
        if made_for != here:
            raise KernelBundleError(f"{folder}: made for {what} {made_for}, here is {here}; build it anew")

    class BundleCache(FileCacheManager):  # type: ignore[misc]
        """Triton's cache, which looks into the bundle first."""

        def get_group(self, filename: str) -> dict[str, str] | None:
            paths = [path for path in (folder / self.key).glob("*") if path.suffix in (".json", ".cubin")]
            if (folder / self.key / filename).exists():
                return {path.name: str(path) for path in paths}
            found: dict[str, str] | None = super().get_group(filename)
            return found

    triton.knobs.cache.manager_class = BundleCache
    return manifest


def _read_manifest(path: Path) -> Manifest:
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return Manifest(**{**data, "kernels": tuple(data["kernels"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise KernelBundleError(f"{path}: not a bundle of kernels: {error}") from error
