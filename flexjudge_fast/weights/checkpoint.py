"""What a checkpoint offers to the rest, and how one is opened from a path or hub id."""

import hashlib
import json
import os
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flexjudge_fast.errors import CheckpointError
from flexjudge_fast.weights.processor_config import ProcessorConfig
from flexjudge_fast.weights.tensor import StoredWeight

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


class Checkpoint(ABC):
    """A model's files. Names, config and tokenizer are in the Hugging Face layout, whatever the container."""

    path: Path
    config: dict[str, Any]
    tokenizer_config: dict[str, Any]
    generation_config: dict[str, Any]
    layout: str = "as stored"  # of its weights, in words

    def __init__(self) -> None:
        self._hash: str | None = None
        self._hashing: threading.Thread | None = None

    @abstractmethod
    def tensor_names(self) -> Sequence[str]:
        """Names such as `model.layers.0.self_attn.q_proj.weight`."""

    @abstractmethod
    def tensor(self, name: str) -> StoredWeight:
        """One tensor, not copied where it can be mapped. CheckpointError when missing or broken."""

    @abstractmethod
    def tokenizer_json(self) -> str:
        """The text of a `tokenizer.json`."""

    def processor_config(self, kind: str) -> ProcessorConfig:
        """How media of a kind ("image", "video" or "audio") are prepared; empty for a text model."""
        return ProcessorConfig("preprocessor_config.json", {})

    @abstractmethod
    def weight_files(self) -> Sequence[Path]:
        """The files that hold tensors of `tensor_names`."""

    def start_hashing(self) -> None:
        """Begin to hash the weights in the background."""
        if self._hashing is None:
            self._hashing = threading.Thread(target=self._compute_hash, daemon=True)
            self._hashing.start()

    def weights_hash(self) -> str:
        """`sha256:` of the weight file; of several files, of their sorted lines `name sha256`.

        A file that holds a tensor of `tensor_names` counts with all its bytes. Others do not count, such as
        files with nothing but a Qwen2.5-Omni's talker.
        """
        self.start_hashing()
        assert self._hashing is not None
        self._hashing.join()
        if self._hash is None:
            raise CheckpointError(f"{self.path}: the weight files can no longer be read")
        return self._hash

    def _compute_hash(self) -> None:
        lines = []
        try:
            for path in sorted(self.weight_files()):
                with path.open("rb") as file:
                    lines.append((path.name, hashlib.file_digest(file, "sha256").hexdigest()))
        except OSError:
            return  # weights_hash() raises in the thread that asks
        joined = "".join(f"{name} {digest}\n" for name, digest in lines)
        digest = lines[0][1] if len(lines) == 1 else hashlib.sha256(joined.encode()).hexdigest()
        self._hash = f"sha256:{digest}"


def open_checkpoint(model: str | Path, revision: str | None = None) -> Checkpoint:
    """Open a `.gguf` file, a folder with safetensors or one `.gguf`, or a hub id such as `org/name`.

    Raises:
        CheckpointError: there is no such model, or only pickled weights, which are never loaded.
    """
    path = Path(model).expanduser()
    if not path.exists():
        if isinstance(model, Path) or not re.fullmatch(r"[\w.-]+/[\w.-]+", model) or model.endswith(".gguf"):
            raise CheckpointError(f"{model}: no such file or folder")
        path = _download(model, revision)
    if path.is_file():
        if path.suffix != ".gguf":
            raise CheckpointError(f"{path}: a .gguf file or a folder is expected")
        return _open_gguf(path)
    if any(path.glob("*.safetensors")) or (path / "model.safetensors.index.json").exists():
        from flexjudge_fast.weights.published import open_published
        from flexjudge_fast.weights.safetensors_folder import SafetensorsCheckpoint

        return open_published(SafetensorsCheckpoint(path))
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1:
        return _open_gguf(ggufs[0])
    if ggufs:
        raise CheckpointError(f"{path}: it holds {len(ggufs)} .gguf files; name the one to load")
    if any(next(path.glob(pattern), None) for pattern in _PICKLES):
        raise CheckpointError(
            f"{path}: it holds only pickled weights, which are never loaded; use safetensors"
        )
    raise CheckpointError(f"{path}: it holds neither safetensors nor a .gguf file")


def _open_gguf(path: Path) -> Checkpoint:
    from flexjudge_fast.weights.gguf_file import GgufCheckpoint  # importing gguf takes 50 ms

    return GgufCheckpoint(path)


def _download(model: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub's client raises errors of many libraries
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{model}: no such folder here, and not to be had from the Hugging Face hub{offline}: {reason}"
        ) from error


def read_json(path: Path, required: bool = False) -> dict[str, Any]:
    """A JSON object; empty when the file is missing and not required."""
    if not path.exists() and not required:
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: a JSON object is expected")
    return data
