"""A Hugging Face folder: config, tokenizer, and safetensors in one file or in shards."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from flexjudge_fast.errors import CheckpointError, UnsupportedCheckpointError
from flexjudge_fast.weights.checkpoint import Checkpoint, read_json
from flexjudge_fast.weights.formats import find_format
from flexjudge_fast.weights.processor_config import ProcessorConfig
from flexjudge_fast.weights.tensor import DenseTensor, QuantTensor, Weight

_INDEX = "model.safetensors.index.json"
_NEVER_READ = ("talker.", "token2wav.")  # what speaks in a whole Qwen2.5-Omni
# By kind of media: objects of processor_config.json, which transformers 5 writes, and the older file.
_PROCESSORS = {
    "image": (("image_processor",), "preprocessor_config.json"),
    "video": (("video_processor",), "video_preprocessor_config.json"),
    "audio": (("feature_extractor", "audio_processor"), "preprocessor_config.json"),
}


class SafetensorsCheckpoint(Checkpoint):
    """Tensors are mapped into memory and read when asked for; a talker's and a vocoder's are passed over."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.config = read_json(path / "config.json", required=True)
        self.tokenizer_config = read_json(path / "tokenizer_config.json")
        self.generation_config = read_json(path / "generation_config.json")
        template = _chat_template(path, self.tokenizer_config)
        self.tokenizer_config = {**self.tokenizer_config, "chat_template": template}
        self._files: dict[Path, Any] = {}
        self._where = self._read_index()
        self._formats: dict[Path, dict[str, str]] = {}

    def tensor_names(self) -> Sequence[str]:
        return tuple(self._where)

    def weight_files(self) -> Sequence[Path]:
        return sorted(set(self._where.values()))

    def tensor(self, name: str) -> Weight:
        data = self.stored_tensor(name)
        path = self._where[name]
        if data.dtype == torch.uint8:
            return self._blocks(path, name, data)
        if not data.is_floating_point():
            raise UnsupportedCheckpointError(
                f"{path}: tensor {name} is {data.dtype}, a float type is expected"
            )
        return DenseTensor(data)

    def stored_tensor(self, name: str) -> torch.Tensor:
        """A tensor of whatever dtype. CheckpointError when missing or broken."""
        if name not in self._where:
            raise CheckpointError(f"{self.path}: tensor {name} is missing")
        path = self._where[name]
        try:
            data: torch.Tensor = self._open(path).get_tensor(name)
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{path}: tensor {name}: {error}") from error
        return data

    def _blocks(self, path: Path, name: str, data: torch.Tensor) -> QuantTensor:
        """A matrix that `flexjudge quantize` wrote: the file's metadata names its format."""
        if path not in self._formats:
            try:
                self._formats[path] = dict(
                    json.loads((self._open(path).metadata() or {}).get("formats", "{}"))
                )
            except (ValueError, TypeError, RecursionError) as error:
                raise CheckpointError(f"{path}: metadata formats: {error}") from error
        found = self._formats[path].get(name)
        if not isinstance(found, str):
            raise UnsupportedCheckpointError(
                f"{path}: tensor {name} is {data.dtype}, a float type is expected"
            )
        kind = find_format(found)
        if kind is None:
            raise UnsupportedCheckpointError(f"{path}: tensor {name} has the unknown format {found!r}")
        if data.dim() != 2 or data.shape[1] % kind.block_bytes:
            raise CheckpointError(f"{path}: tensor {name} of shape {tuple(data.shape)} cannot be {found}")
        columns = data.shape[1] // kind.block_bytes * kind.block_size
        return QuantTensor(data, kind, (data.shape[0], columns))

    def tokenizer_json(self) -> str:
        path = self.path / "tokenizer.json"
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: {error}") from error

    def processor_config(self, kind: str) -> ProcessorConfig:
        names, older = _PROCESSORS[kind]
        path = self.path / "processor_config.json"
        given = read_json(path)
        name = next((name for name in names if given.get(name) is not None), None)
        if name is None:
            return ProcessorConfig(older, read_json(self.path / older))
        if not isinstance(given[name], dict):
            raise CheckpointError(f"{path}: {name} must be an object")
        return ProcessorConfig(f"{path.name}, {name}", given[name])

    def _open(self, path: Path) -> Any:
        if path not in self._files:
            try:
                self._files[path] = safe_open(path, framework="pt", device="cpu")
            except (SafetensorError, OSError, ValueError) as error:
                raise CheckpointError(f"{path}: {error}") from error
        return self._files[path]

    def _read_index(self) -> dict[str, Path]:
        """Which file holds each tensor; what the index says must be what the files hold.

        Files that the index knows to hold nothing that is read need not be there.
        """
        if not (self.path / _INDEX).exists():
            where: dict[str, Path] = {}
            for file in sorted(self.path.glob("*.safetensors")):
                for name in filter(_is_read, self._open(file).keys()):
                    if name in where:
                        raise CheckpointError(f"{file}: tensor {name} is in {where[name].name} too")
                    where[name] = file
            return where
        weight_map = read_json(self.path / _INDEX, required=True).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{self.path / _INDEX}: weight_map is missing")
        shards = {name: str(shard) for name, shard in weight_map.items()}
        for shard in shards.values():
            if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors", shard):
                raise CheckpointError(f"{self.path / _INDEX}: {shard!r} is not a plain safetensors file name")
        shards = {name: shard for name, shard in shards.items() if _is_read(name)}
        held: dict[str, set[str]] = {}
        for shard in set(shards.values()):
            if not (self.path / shard).exists():
                raise CheckpointError(f"{self.path / shard}: the shard is missing")
            held[shard] = set(self._open(self.path / shard).keys())
        for name, shard in shards.items():
            if name not in held[shard]:
                raise CheckpointError(f"{self.path / shard}: tensor {name} is missing, the index names it")
        return {name: self.path / shard for name, shard in shards.items()}


def _is_read(name: str) -> bool:
    return not name.startswith(_NEVER_READ)


def _chat_template(path: Path, tokenizer_config: dict[str, Any]) -> str | None:
    """The default template, from wherever this checkpoint's age keeps it."""
    jinja = path / "chat_template.jinja"
    if jinja.exists():
        try:
            return jinja.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{jinja}: {error}") from error
    source = read_json(path / "chat_template.json").get(
        "chat_template", tokenizer_config.get("chat_template")
    )
    if isinstance(source, list):
        named = [entry for entry in source if isinstance(entry, dict)]
        source = next((entry.get("template") for entry in named if entry.get("name") == "default"), None)
    return source if isinstance(source, str) else None
