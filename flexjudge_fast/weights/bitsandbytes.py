"""bitsandbytes: NF4, FP4 and int8 weights, expanded by bitsandbytes itself when they are loaded.

They become dense: no product with weights kept in NF4 is offered, on a GPU neither. Activations beside int8
weights stay as they are, which is more exact than bitsandbytes' own product. Weights can be quantised again,
at a second loss of accuracy: `quantization="int4"`.
"""

import json
import math
from typing import Any

import torch

from flexjudge_fast.errors import UnsupportedCheckpointError
from flexjudge_fast.weights.layout import Fields, Layout, Module
from flexjudge_fast.weights.tensor import DenseTensor

_STATES = {"nf4": "weight.quant_state.bitsandbytes__nf4", "fp4": "weight.quant_state.bitsandbytes__fp4"}
_FLOAT32_MAX = 3.4028234663852886e38
_BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_DTYPES = ("float16", "bfloat16", "float32")
_MOST_STATE_BYTES = 4096
# How products are computed, not what weights are; and what each 4-bit tensor says for itself.
_HARMLESS = frozenset(
    [
        "quant_method",
        "_load_in_4bit",
        "_load_in_8bit",
        "bnb_4bit_compute_dtype",
        "bnb_4bit_quant_type",
        "bnb_4bit_use_double_quant",
        "llm_int8_threshold",
        "llm_int8_enable_fp32_cpu_offload",
        "llm_int8_has_fp16_weight",
    ]
)


class BitsAndBytes(Layout):
    """Tensors, for a matrix [out, in]:

    4 bits: weight uint8 [out * in / 2, 1]; weight.absmax, a scale per block of weights, float32, or uint8
    codes with weight.nested_absmax and weight.nested_quant_map; weight.quant_map float32 [16]; and
    weight.quant_state.bitsandbytes__nf4 (or fp4), the bytes of a JSON object.
    8 bits: weight int8 [out, in]; SCB float32 [out], each row's largest magnitude; weight_format uint8, 0.

    All sizes are checked here, before code that trusts them runs.

    Raises:
        UnsupportedCheckpointError: a field asks for something else.
    """

    def __init__(self, fields: Fields) -> None:
        four, eight = (bool(fields.one_of(f"load_in_{n}bit", (True, False), False)) for n in (4, 8))
        if four == eight:
            raise fields.error("load_in_4bit", four, f"load_in_8bit is {eight}: one of them must be true")
        fields.one_of("bnb_4bit_quant_storage", ("uint8",), "uint8")
        self.ignored = fields.names("llm_int8_skip_modules")
        fields.finish(_HARMLESS)
        scales = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
        parts = [*(f"weight.{name}" for name in scales), *_STATES.values()]
        self.is_four = four
        self.parts = ("weight", *(parts if four else ("SCB", "weight_format")))
        self.summary = f"bitsandbytes, {4 if four else 8} bits, expanded when loaded"

    def weight(self, module: Module) -> DenseTensor:
        return _four_bits(module) if self.is_four else _eight_bits(module)


def _eight_bits(module: Module) -> DenseTensor:
    codes = module.take("weight", (torch.int8,), (None, None))
    largest = module.take("SCB", (torch.float32,), (codes.shape[0],))
    if "weight_format" in module.parts and int(module.take("weight_format", (torch.uint8,), ())) != 0:
        raise module.unsupported("weight_format", "is not 0: only whole rows are supported")
    return DenseTensor(_functional(module).int8_vectorwise_dequant(codes, largest))


def _four_bits(module: Module) -> DenseTensor:
    kinds = [kind for kind, part in _STATES.items() if part in module.parts]
    if len(kinds) != 1:
        raise module.error(_STATES["nf4"], "or fp4 is expected once")
    part = _STATES[kinds[0]]
    state = _read_state(module, part)
    state.one_of("quant_type", (kinds[0],))
    state.one_of("dtype", _DTYPES)
    block_size = int(state.one_of("blocksize", _BLOCK_SIZES))
    shape = state.take("shape")
    if not isinstance(shape, list) or len(shape) != 2 or any(type(n) is not int or n <= 0 for n in shape):
        raise state.error("shape", shape, "two sizes are expected")
    size = math.prod(shape)
    if size % 2:
        raise state.error("shape", shape, "an even number of weights is expected")
    module.take("weight", (torch.uint8,), (size // 2, 1))
    module.take("weight.quant_map", (torch.float32,), (16,))
    num_blocks = -(-size // block_size)
    is_nested = "weight.nested_absmax" in module.parts
    module.take("weight.absmax", (torch.uint8,) if is_nested else (torch.float32,), (num_blocks,))
    if is_nested:
        nested_size = int(state.one_of("nested_blocksize", (256, *_BLOCK_SIZES)))
        state.one_of("nested_dtype", ("float32",))
        offset = state.take("nested_offset")
        if type(offset) not in (int, float) or not abs(offset) <= _FLOAT32_MAX:
            raise state.error("nested_offset", offset, "a number of float32 is expected")
        module.take("weight.nested_absmax", (torch.float32,), (-(-num_blocks // nested_size),))
        module.take("weight.nested_quant_map", (torch.float32,), (256,))
    state.finish(())
    return DenseTensor(_expand(module, part, is_nested))


def _expand(module: Module, part: str, is_nested: bool) -> torch.Tensor:
    functional = _functional(module)
    names = ["absmax", "quant_map", *(["nested_absmax", "nested_quant_map"] if is_nested else [])]
    tensors = {name: module.stored(f"weight.{name}") for name in names}
    tensors[part.removeprefix("weight.")] = module.stored(part)
    state = functional.QuantState.from_dict(tensors, torch.device("cpu"))
    out: torch.Tensor = functional.dequantize_4bit(module.stored("weight"), state)
    return out


def _read_state(module: Module, part: str) -> Fields:
    data = module.take(part, (torch.uint8,), (None,))
    if data.numel() > _MOST_STATE_BYTES:
        raise module.error(part, f"has {data.numel()} bytes, {_MOST_STATE_BYTES} at most are expected")
    try:
        state = json.loads(bytes(data.tolist()))
    except (ValueError, RecursionError) as error:
        raise module.error(part, f"is no JSON: {error}") from error
    return Fields(state, f"tensor {module.name}.{part}")


def _functional(module: Module) -> Any:
    try:
        from bitsandbytes import functional
    except ImportError as error:
        raise UnsupportedCheckpointError(
            f"{module.path}: quantised by bitsandbytes, which is needed to read it ({error}): "
            'pip install "flexjudge_fast[bitsandbytes]"'
        ) from error
    return functional
