"""Tiny checkpoints in the layouts that other libraries publish, packed by plain code after their rules."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass
class Grouped:
    """Codes [out, in], scales and zero points [out, groups], of a matrix rounded to the nearest."""

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor

    @property
    def dense(self) -> torch.Tensor:
        size = self.codes.shape[1] // self.scales.shape[1]
        scales, zeros = (t.repeat_interleave(size, 1) for t in (self.scales.float(), self.zeros))
        return scales * (self.codes - zeros).float()


def group(
    weight: torch.Tensor, bits: int = 4, size: int = 32, symmetric: bool = False, dtype: Any = torch.float16
) -> Grouped:
    """Zero points lie between 1 and the largest code, as GPTQ's first format needs it."""
    parts = weight.unflatten(1, (-1, weight.shape[1] if size == -1 else size))
    top = 2**bits - 1
    if symmetric:
        scales = (parts.abs().amax(2) / (top // 2)).to(dtype)
        zeros = torch.full_like(scales, 2 ** (bits - 1)).int()
    else:
        low, high = parts.amin(2), parts.amax(2)
        scales = ((high - low) / top).to(dtype)
        zeros = (-low / scales.float()).round().clamp(1, top).int()
    codes = (parts / scales.float().unsqueeze(2)).round() + zeros.unsqueeze(2)
    return Grouped(codes.clamp(0, top).int().flatten(1), scales, zeros)


def words_of(columns: list[torch.Tensor], bits: int) -> torch.Tensor:
    """One int32 word of 32 / bits codes, the first in the lowest bits."""
    word = sum(column.long() << (bits * i) for i, column in enumerate(columns))
    assert isinstance(word, torch.Tensor)
    return torch.where(word >= 2**31, word - 2**32, word).int()


def pack_rows(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """[n, m] to int32 [n * bits / 32 rounded up, m]: a word holds neighbours of one column."""
    per_word = 32 // bits
    missing = torch.zeros(-codes.shape[0] % per_word, codes.shape[1], dtype=codes.dtype)
    codes = torch.cat((codes, missing))
    rows = [words_of(list(codes[at : at + per_word]), bits) for at in range(0, codes.shape[0], per_word)]
    return torch.stack(rows)


def gptq(
    weight: torch.Tensor, bits: int = 4, size: int = 32, symmetric: bool = False, v2: bool = False
) -> Any:
    q = group(weight, bits, size, symmetric)
    columns = weight.shape[1]
    return q.dense, {
        "qweight": pack_rows(q.codes.T, bits),
        "qzeros": pack_rows((q.zeros - (0 if v2 else 1)), bits).T.contiguous(),
        "scales": q.scales.T.contiguous(),
        "g_idx": (torch.arange(columns) // (columns if size == -1 else size)).int(),
    }


def awq(weight: torch.Tensor, size: int = 32) -> Any:
    q = group(weight, 4, size)

    def pack(codes: torch.Tensor) -> torch.Tensor:  # [n, out] to [n, out / 8]
        eights = range(0, codes.shape[1], 8)
        return torch.stack([words_of([codes[:, at + i] for i in AWQ_ORDER], 4) for at in eights], 1)

    return q.dense, {"qweight": pack(q.codes.T), "qzeros": pack(q.zeros.T), "scales": q.scales.T.contiguous()}


def packed(
    weight: torch.Tensor, bits: int = 4, size: int = 32, symmetric: bool = True, dtype: Any = torch.bfloat16
) -> Any:
    """compressed-tensors' pack-quantized."""
    q = group(weight, bits, size, symmetric, dtype)
    parts = {
        "weight_packed": pack_rows(q.codes.T, bits).T.contiguous(),
        "weight_scale": q.scales,
        "weight_shape": torch.tensor(weight.shape),
    }
    if not symmetric:
        parts["weight_zero_point"] = pack_rows(q.zeros, bits)
    return q.dense, parts


def eight_bits(weight: torch.Tensor, dtype: torch.dtype = torch.int8, per_row: bool = True) -> Any:
    """compressed-tensors' int-quantized and float-quantized."""
    largest = weight.abs().amax(1, keepdim=True) if per_row else weight.abs().max().reshape(1)
    scales = (largest / (127 if dtype == torch.int8 else 448)).bfloat16().float()
    scaled = weight / scales
    codes = (scaled.round().clamp(-127, 127) if dtype == torch.int8 else scaled.clamp(-448, 448)).to(dtype)
    return codes.float() * scales, {"weight": codes, "weight_scale": scales.bfloat16()}


def four_bits(weight: torch.Tensor, kind: str = "nf4", nested: bool = False) -> Any:
    """bitsandbytes' 4 bits, written by bitsandbytes."""
    from bitsandbytes import functional

    codes, state = functional.quantize_4bit(
        weight.to(torch.bfloat16), blocksize=64, compress_statistics=nested, quant_type=kind
    )
    parts = {f"weight.{name}": value for name, value in state.as_dict(packed=True).items()}
    return expand_four_bits(codes, state), {"weight": codes, **parts}


def expand_four_bits(codes: torch.Tensor, state: Any) -> torch.Tensor:
    """Codebook times scale: the first weight in a byte's high nibble."""
    flat = torch.stack((codes.flatten() >> 4, codes.flatten() & 15), 1).flatten().long()
    scales = state.absmax
    if state.nested:
        spread = state.state2.absmax.repeat_interleave(state.state2.blocksize)[: scales.numel()]
        scales = state.state2.code[scales.long()] * spread + state.offset
    values = state.code[flat] * scales.repeat_interleave(state.blocksize)[: flat.numel()]
    return values.to(state.dtype).float().reshape(state.shape)


def int8_rows(weight: torch.Tensor) -> Any:
    """bitsandbytes' 8 bits: codes, and the largest magnitude of each row."""
    largest = weight.abs().amax(1)
    codes = (weight * (127 / largest[:, None])).round().to(torch.int8)
    dense = codes.float() * largest[:, None] / 127
    return dense, {"weight": codes, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}


@dataclass
class Published:
    """One layout: how a matrix becomes tensors, and what config.json says."""

    name: str
    write: Callable[..., Any]
    arguments: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)


def _gptq(name: str, bits: int = 4, size: int = 32, v2: bool = False, symmetric: bool = False) -> Published:
    config = {"quant_method": "gptq", "bits": bits, "group_size": size, "desc_act": False, "sym": symmetric}
    config |= {"damp_percent": 0.1, "true_sequential": True, "checkpoint_format": "gptq_v2" if v2 else "gptq"}
    return Published(name, gptq, {"bits": bits, "size": size, "symmetric": symmetric, "v2": v2}, config)


def _awq(name: str, size: int) -> Published:
    config = {"quant_method": "awq", "bits": 4, "group_size": size, "version": "gemm", "zero_point": True}
    return Published(name, awq, {"size": size}, {**config, "modules_to_not_convert": ["lm_head"]})


def tensors_config(layout: str, weights: dict[str, Any], inputs: Any = None) -> dict[str, Any]:
    """compressed-tensors' part of config.json."""
    weights = {"type": "int", "dynamic": False, "observer": "minmax", "symmetric": True, **weights}
    scheme = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {**scheme, "output_activations": None}},
        "ignore": ["lm_head", "re:visual.*"],
        "kv_cache_scheme": None,
        "global_compression_ratio": 1.5,
    }


def _packed(name: str, bits: int = 4, size: int = 32, **arguments: Any) -> Published:
    weights: dict[str, Any] = {"num_bits": bits, "strategy": "group", "group_size": size}
    if size == -1:
        weights = {"num_bits": bits, "strategy": "channel", "group_size": None}
    weights["symmetric"] = arguments.get("symmetric", True)
    config = tensors_config("pack-quantized", weights)
    return Published(name, packed, {"bits": bits, "size": size, **arguments}, config)


def _eight(name: str, dtype: torch.dtype, strategy: str = "channel") -> Published:
    kind, layout = ("int", "int-quantized") if dtype == torch.int8 else ("float", "float-quantized")
    weights = {"num_bits": 8, "type": kind, "strategy": strategy}
    inputs = {"num_bits": 8, "type": kind, "symmetric": True, "dynamic": True, "strategy": "token"}
    arguments = {"dtype": dtype, "per_row": strategy == "channel"}
    return Published(name, eight_bits, arguments, tensors_config(layout, weights, inputs))


def _bitsandbytes(name: str, write: Callable[..., Any], **arguments: Any) -> Published:
    four = write is four_bits
    config = {"quant_method": "bitsandbytes", "load_in_4bit": four, "load_in_8bit": not four}
    config |= {
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_threshold": 6.0,
    }
    config |= {"bnb_4bit_quant_type": arguments.get("kind", "fp4"), "llm_int8_skip_modules": ["lm_head"]}
    return Published(name, write, arguments, config)


LAYOUTS = {
    layout.name: layout
    for layout in (
        _gptq("gptq", symmetric=True),
        _gptq("gptq-asymmetric", size=64),
        _gptq("gptq-v2", size=128, v2=True),
        _gptq("gptq-rows", size=-1),
        _gptq("gptq-8", bits=8, size=64),
        _awq("awq", 64),
        _awq("awq-rows", -1),
        _packed("packed"),
        _packed("packed-asymmetric", size=128, symmetric=False),
        _packed("packed-rows", size=-1, dtype=torch.float32),
        _packed("packed-8", bits=8, size=64, dtype=torch.float16),
        _eight("int8", torch.int8),
        _eight("int8-tensor", torch.int8, "tensor"),
        _eight("fp8", torch.float8_e4m3fn),
        _bitsandbytes("nf4", four_bits, kind="nf4"),
        _bitsandbytes("nf4-nested", four_bits, kind="nf4", nested=True),
        _bitsandbytes("fp4", four_bits, kind="fp4"),
        _bitsandbytes("bnb-int8", int8_rows),
    )
}


def publish(
    source: Path, folder: Path, layout: Published, chosen: str = r".*_proj\.weight"
) -> tuple[Path, Path]:
    """Two folders: the model of `source` with the `chosen` in `layout`, and the same numbers dense."""
    good, dense = folder / layout.name, folder / f"{layout.name}-dense"
    for target in (good, dense):
        shutil.copytree(source, target)
    tensors, plain = {}, {}
    for name, weight in load_file(source / "model.safetensors").items():
        plain[name], parts = weight, {}
        if re.fullmatch(chosen, name):
            plain[name], parts = layout.write(weight, **layout.arguments)
        module = name.removesuffix(".weight")
        tensors |= {f"{module}.{part}": data for part, data in parts.items()} or {name: weight}
    save(good, tensors)
    save(dense, plain)
    edit_config(good, quantization_config=layout.config)
    return good, dense


def save(folder: Path, tensors: Tensors) -> None:
    data = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(data, folder / "model.safetensors", {"format": "pt"})


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
