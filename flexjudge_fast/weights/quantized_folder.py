"""Writes a checkpoint, quantised or as stored, to a folder that loads fast: `flexjudge quantize`."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from flexjudge_fast.errors import CheckpointError, InvalidArgumentError, UnsupportedCheckpointError
from flexjudge_fast.ops.linear_w8a8 import W8Matrix
from flexjudge_fast.weights.checkpoint import Checkpoint, read_json
from flexjudge_fast.weights.quantization import OWN_CONFIG, Quantization
from flexjudge_fast.weights.tensor import QuantTensor, Weight

_SHARD_BYTES = 2 << 30
_COPIED = ("*.json", "*.jinja", "*.txt", "*.model", "LICENSE*", "NOTICE*")
_OWN = ("config.json", "tokenizer_config.json", "generation_config.json", "tokenizer.json")


def write_folder(
    checkpoint: Checkpoint, out: Path, quantization: Quantization | None, replace: bool = False
) -> int:
    """Write `checkpoint` to the folder `out`, which appears only when it is complete.

    Quantised matrices are uint8 tensors of blocks; their file's metadata "formats" names each one's format.

    Args:
        quantization: of dense weights; `None` keeps every tensor as stored.
        replace: a folder that is there gives way, if it is empty or was written so.

    Returns:
        Bytes of all weights.

    Raises:
        InvalidArgumentError: `out` exists, or a tensor cannot be quantised so.
        UnsupportedCheckpointError: the checkpoint is quantised in another way.
        CheckpointError: a tensor is broken, or the disk cannot take the folder.
    """
    out = out.resolve()
    if checkpoint.config.get("quantization_config") not in (None, OWN_CONFIG):
        raise UnsupportedCheckpointError(
            f"{checkpoint.path}: it is quantised already, in a way that this version does not read"
        )
    if out.exists() and not replace:
        raise InvalidArgumentError(f"{out}: it exists already; pass --force to replace it")
    if out.exists() and checkpoint.path.resolve().is_relative_to(out):
        raise InvalidArgumentError(f"{out}: it holds the checkpoint that is read")
    if out.exists() and not _is_ours(out):
        raise InvalidArgumentError(f"{out}: only an empty folder or one written by this command is replaced")
    work: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=out.name + ".", dir=out.parent))
        part = work / "new"
        part.mkdir()
        num_bytes = _write_weights(checkpoint, part, quantization)
        _write_rest(checkpoint, part)
        if out.exists():
            out.rename(work / "old")
        part.rename(out)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{out}: {error}") from error
    finally:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)
    return num_bytes


def _is_ours(folder: Path) -> bool:
    """Empty, or written by `write_folder`."""
    if not folder.is_dir():
        return False
    if not any(folder.iterdir()):
        return True
    try:
        return read_json(folder / "config.json").get("quantization_config") == OWN_CONFIG
    except CheckpointError:
        return False


def _write_weights(checkpoint: Checkpoint, folder: Path, quantization: Quantization | None) -> int:
    """Shard after shard, so that no more than one is in memory; then the index that names them."""
    files: list[tuple[Path, list[str]]] = []
    total = 0
    for tensors in _shards(checkpoint, quantization):
        path = folder / f"part-{len(files)}.safetensors"
        data = {n: w.blocks if isinstance(w, QuantTensor) else w.data for n, w in tensors.items()}
        formats = {n: w.format.name for n, w in tensors.items() if isinstance(w, QuantTensor)}
        save_file({n: t.contiguous() for n, t in data.items()}, path, {"formats": json.dumps(formats)})
        files.append((path, list(tensors)))
        total += sum(t.nbytes for t in data.values())
    weight_map: dict[str, str] = {}
    for i, (path, names) in enumerate(files):
        name = f"model-{i + 1:05}-of-{len(files):05}.safetensors"
        path.chmod(0o644)  # save_file leaves it to its owner alone
        path.rename(folder / name)
        weight_map |= dict.fromkeys(names, name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(folder / "model.safetensors.index.json", index)
    return total


def _shards(checkpoint: Checkpoint, quantization: Quantization | None) -> Iterator[dict[str, Weight]]:
    shard: dict[str, Weight] = {}
    size = 0
    for name in checkpoint.tensor_names():
        weight = checkpoint.tensor(name)
        if quantization is not None:
            weight = quantization.apply(name, weight)
        if isinstance(weight, W8Matrix):
            raise UnsupportedCheckpointError(
                f"{checkpoint.path}: tensor {name} wants its activations quantised to {weight.codes.dtype}, "
                "which the folder cannot say; load the checkpoint as it is"
            )
        if not weight.is_finite():
            raise CheckpointError(f"{checkpoint.path}: tensor {name} holds NaN or infinite values")
        if size and size + weight.nbytes > _SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = weight
        size += weight.nbytes
    yield shard


def _write_rest(checkpoint: Checkpoint, folder: Path) -> None:
    """Config, tokenizer, and whatever else a Hugging Face folder holds beside its weights."""
    if checkpoint.path.is_dir():
        for path in (found for pattern in _COPIED for found in checkpoint.path.glob(pattern)):
            if path.name not in _OWN and not path.name.endswith(".index.json"):
                shutil.copy(path, folder)
    _write_json(folder / "config.json", {**checkpoint.config, "quantization_config": OWN_CONFIG})
    _write_json(folder / "tokenizer_config.json", checkpoint.tokenizer_config)
    if checkpoint.generation_config:
        _write_json(folder / "generation_config.json", checkpoint.generation_config)
    (folder / "tokenizer.json").write_text(checkpoint.tokenizer_json(), encoding="utf-8")


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False, default=_plain), encoding="utf-8")


def _plain(value: Any) -> Any:
    """numpy's numbers, which a GGUF's metadata holds."""
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{type(value).__name__} is no JSON")
