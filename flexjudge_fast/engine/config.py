"""The engine's limits, and how the KV cache is sized from memory."""

import re
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from flexjudge_fast.errors import InvalidArgumentError

_UNITS = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KV_CACHE_DTYPES = {**DTYPES, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
ATTENTION_BACKENDS = ("auto", "triton", "flash-attn", "torch")


@dataclass(frozen=True)
class EngineConfig:
    """Limits of one engine.

    Args:
        max_model_len: the most tokens of a sequence; the checkpoint's own limit when `None`.
        max_num_seqs: sequences computed side by side.
        max_batched_tokens: the most tokens of one step; longer prompts are computed in chunks.
        block_size: tokens per KV block.
        kv_cache_memory: bytes, or a string such as "2GiB"; from `kv_cache_fraction` when `None`.
        kv_cache_fraction: share of the memory that is free after loading; 0.9 on a GPU, 0.25 on a CPU.
        kv_cache_dtype: what keys and values are stored as: "auto" (the model's dtype), "float32", "bfloat16",
            "float16" or "int8", which halves bfloat16's memory: 8-bit codes and a float scale per token and
            KV head; on a GPU also "fp8".
        prefix_caching: keep computed prefixes for later requests.
        encoder_cache_memory: bytes, or a string such as "512MiB", for embeddings of media; 0 keeps none.
        encoder_cache_dir: a folder where embeddings are kept beyond the process; none when `None`.
        encoder_cache_disk: the most that folder may hold, as bytes or a string.
        max_encoder_patches: patches that are encoded at once; it bounds the memory of a pass.
        conformer_timeout: seconds that placing a molecule's atoms may take.
        activations: what activations become before a product with quantised weights, on the CPU: "int16"
            (greedy text is nearly always that of float32) or "int8" (faster on prompts and batches).
        num_threads: threads of a step on the CPU; torch's number when `None`.
        attention_backend: on a GPU, "triton" (our kernels, as "auto" means), "flash-attn" (that package;
            16-bit caches with a block_size of 256) or "torch" (plain and slow, to compare with).
        cuda_graphs: record decode steps once and replay them.
        kernel_bundle: a folder of compiled kernels, see `python -m flexjudge_fast.kernels build`.
    """

    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_batched_tokens: int = 1024
    block_size: int = 16
    kv_cache_memory: int | str | None = None
    kv_cache_fraction: float | None = None
    kv_cache_dtype: str = "auto"
    prefix_caching: bool = True
    encoder_cache_memory: int | str = "512MiB"
    encoder_cache_dir: str | Path | None = None
    encoder_cache_disk: int | str = "8GiB"
    max_encoder_patches: int = 4096
    conformer_timeout: float = 30.0
    activations: str = "int16"
    num_threads: int | None = None
    attention_backend: str = "auto"
    cuda_graphs: bool = True
    kernel_bundle: str | Path | None = None

    def __post_init__(self) -> None:
        if self.activations not in ("int16", "int8"):
            raise InvalidArgumentError(f'activations={self.activations!r}: must be "int16" or "int8"')
        if self.attention_backend not in ATTENTION_BACKENDS:
            known = ", ".join(ATTENTION_BACKENDS)
            raise InvalidArgumentError(
                f"attention_backend={self.attention_backend!r}: must be one of {known}"
            )
        if self.kv_cache_dtype not in ("auto", *KV_CACHE_DTYPES):
            known = ", ".join(KV_CACHE_DTYPES)
            raise InvalidArgumentError(
                f"kv_cache_dtype={self.kv_cache_dtype!r}: must be auto or one of {known}"
            )
        for name in (
            "max_model_len",
            "max_num_seqs",
            "max_batched_tokens",
            "block_size",
            "num_threads",
            "max_encoder_patches",
        ):
            value = getattr(self, name)
            if value is None and name in ("max_model_len", "num_threads"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InvalidArgumentError(f"{name}={value!r}: must be an integer of at least 1")
        seconds = self.conformer_timeout
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 1 <= seconds <= 3600:
            raise InvalidArgumentError(f"conformer_timeout={seconds!r}: must be from 1 to 3600 seconds")
        fraction = self.kv_cache_fraction
        if fraction is not None and not 0 < fraction <= 1:
            raise InvalidArgumentError(f"kv_cache_fraction={fraction!r}: must be above 0 and at most 1")
        for name in ("kv_cache_memory", "encoder_cache_memory", "encoder_cache_disk"):
            if getattr(self, name) is not None and (name, getattr(self, name)) != ("encoder_cache_memory", 0):
                parse_bytes(name, getattr(self, name))


def parse_bytes(name: str, value: int | str) -> int:
    """Bytes of an int or of a string such as "512MiB"."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", value)
        if match and match[2].lower() in _UNITS and float(match[1]) > 0:
            return int(float(match[1]) * _UNITS[match[2].lower()])
    raise InvalidArgumentError(f'{name}={value!r}: must be a number of bytes or a string such as "2GiB"')


def num_kv_blocks(config: EngineConfig, block_bytes: int, max_model_len: int) -> int:
    """How many blocks of `block_bytes` the KV cache has on a CPU."""
    if config.kv_cache_memory is not None:
        budget = parse_bytes("kv_cache_memory", config.kv_cache_memory)
    else:
        budget = int(psutil.virtual_memory().available * (config.kv_cache_fraction or 0.25))
    return num_blocks_of(config, budget, block_bytes, max_model_len)


def num_blocks_of(config: EngineConfig, budget: int, block_bytes: int, max_model_len: int) -> int:
    """How many blocks `budget` bytes hold; never more than `max_num_seqs` full sequences."""
    most = config.max_num_seqs * (-(-max_model_len // config.block_size) + 1)
    num_blocks = min(budget // block_bytes, most)
    if num_blocks < 2:
        raise InvalidArgumentError(
            f"kv_cache_memory: {budget} bytes hold {num_blocks} blocks of {block_bytes} bytes; "
            "at least 2 are needed"
        )
    return num_blocks


def pick_device(device: str | torch.device) -> torch.device:
    """`"auto"` is the first CUDA device, else the CPU."""
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
    except RuntimeError as error:
        raise InvalidArgumentError(f"device={device!r}: {str(error).splitlines()[0]}") from error
    if picked.type not in ("cpu", "cuda"):
        raise InvalidArgumentError(f"device={device!r}: must be cpu, cuda or auto")
    if picked.type == "cuda" and not torch.cuda.is_available():
        raise InvalidArgumentError(f"device={device!r}: no CUDA device is available")
    return picked


def pick_dtype(dtype: str | torch.dtype, stored: object) -> torch.dtype:
    """`"auto"` is the dtype that config.json names, else float32."""
    if isinstance(dtype, torch.dtype):
        name = str(dtype).removeprefix("torch.")
    else:
        name = str(stored or "float32").removeprefix("torch.") if dtype == "auto" else dtype
    if name not in DTYPES:
        raise InvalidArgumentError(f"dtype={name!r}: must be auto or one of {', '.join(DTYPES)}")
    return DTYPES[name]
