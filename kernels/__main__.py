"""`python -m flexjudge_fast.kernels`: compile kernels ahead of time, and report what they take."""

import argparse
import dataclasses
import sys
import tempfile
from pathlib import Path

import torch

from flexjudge_fast.errors import FlexJudgeError
from flexjudge_fast.kernels.aot.compile import compile_catalog
from flexjudge_fast.kernels.aot.report import write_report
from flexjudge_fast.kernels.bundle import claim_folder, write_bundle
from flexjudge_fast.kernels.catalog import Launch, ModelShape
from flexjudge_fast.kernels.chips import ARCHS, find_arch

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_KV_DTYPES = {**_DTYPES, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
_WORK = Path("build") / "kernels"  # what is compiled already is not compiled again
_WEIGHTS = ("bf16", "w4a16-g128", "int8", "fp8")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m flexjudge_fast.kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="compile every kernel that a model needs into a folder")
    build.add_argument("out", type=Path, help="folder to write; must not exist or be empty")
    build.add_argument("--arch", required=True, choices=[arch.name for arch in ARCHS])
    build.add_argument("--model", help="a checkpoint's folder; Qwen2.5-VL-7B's sizes if left out")
    build.add_argument("--dtype", choices=_DTYPES, default="bfloat16")
    build.add_argument("--kv-cache-dtype", choices=_KV_DTYPES, default="bfloat16")
    build.add_argument("--weights", choices=_WEIGHTS, default="bf16")
    report = commands.add_parser("report", help="compile for every architecture and write the figures")
    report.add_argument("out", type=Path, help="the file to write, such as docs/kernels.md")
    chosen = parser.parse_args(arguments)
    try:
        return _build(chosen) if chosen.command == "build" else _report(chosen.out)
    except (FlexJudgeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _build(chosen: argparse.Namespace) -> int:
    shape = dataclasses.replace(
        ModelShape() if chosen.model is None else _shape_of(chosen.model),
        dtype=_DTYPES[chosen.dtype],
        kv_dtype=_KV_DTYPES[chosen.kv_cache_dtype],
        weights=chosen.weights,
    )
    claim_folder(chosen.out)
    arch = find_arch(chosen.arch)
    with tempfile.TemporaryDirectory() as work:
        compiled = compile_catalog(arch, [shape], Path(work))
        variants = [variant for part in compiled for variant in part.variants]
        manifest = write_bundle(chosen.out, arch.capability, variants)
    print(f"{chosen.out}: {len(manifest.kernels)} kernels for {arch.name}, Triton {manifest.triton}")
    return 0


def _report(out: Path) -> int:
    shapes = [ModelShape(weights=weights) for weights in _WEIGHTS]
    shapes += [ModelShape(kv_dtype=kv_dtype) for kv_dtype in (torch.int8, torch.float8_e4m3fn)]
    found: dict[tuple[str, str, int], Launch] = {}  # a launch that several shapes have is listed once
    compiled = {}
    for arch in ARCHS:
        print(f"{arch.name} ...", file=sys.stderr)
        compiled[arch] = compile_catalog(arch, shapes, _WORK)
        for part in compiled[arch]:
            found.setdefault((part.launch.kernel, part.launch.case, part.launch.tokens), part.launch)
    wrong = write_report(out, compiled, found.values())
    for fault in wrong:
        print(f"fault: {fault}", file=sys.stderr)
    return 1 if wrong else 0


def _shape_of(model: str) -> ModelShape:
    """The sizes that a checkpoint's config.json gives."""
    from flexjudge_fast.models.config import model_config, read_decoder_config
    from flexjudge_fast.models.vision_config import read_vision_config
    from flexjudge_fast.weights.checkpoint import open_checkpoint

    run = model_config(open_checkpoint(model).config)
    decoder = read_decoder_config(run)
    vision = read_vision_config(run)
    return ModelShape(
        hidden=decoder.hidden_size,
        num_heads=decoder.num_heads,
        num_kv_heads=decoder.num_kv_heads,
        head_dim=decoder.head_dim,
        intermediate=decoder.intermediate_size,
        vocab=decoder.vocab_size,
        vision_hidden=vision.hidden_size if vision else 0,
        vision_heads=vision.num_heads if vision else 0,
        vision_head_dim=vision.head_dim if vision else 0,
        vision_intermediate=vision.intermediate_size if vision else 0,
    )


if __name__ == "__main__":
    sys.exit(main())
