"""Which weights `quantization="int8"`, "int4" or "w8a8-int8" quantises, and to what."""

import re
from dataclasses import dataclass

import torch

from flexjudge_fast.errors import InvalidArgumentError
from flexjudge_fast.ops.linear_w8a8 import W8Matrix
from flexjudge_fast.ops.quantize import quantize
from flexjudge_fast.weights.formats import QuantFormat, find_format
from flexjudge_fast.weights.tensor import DenseTensor, QuantTensor, StoredWeight

_LAYER = re.compile(
    r"(model\.|model\.language_model\.|thinker\.model\.)?layers\.\d+\.(self_attn|mlp)\.\w+_proj\.weight"
)
_TABLE = re.compile(r"((.+\.)?embed_tokens|(thinker\.)?lm_head)\.weight")
# What `flexjudge quantize` writes as config.json's `quantization_config`.
OWN_CONFIG = {"quant_method": "flexjudge", "version": 1}
_LAYER_FORMATS = {"int8": "I8_32", "int4": "Q4_1", "int4-g64": "I4_64", "int4-g128": "I4_128"}
QUANTIZATIONS = tuple(_LAYER_FORMATS)
_EIGHT_BITS = {"w8a8-int8": torch.int8, "w8a8-fp8": torch.float8_e4m3fn}
GPU_QUANTIZATIONS = tuple(_EIGHT_BITS)


@dataclass(frozen=True)
class Quantization:
    """Formats of the decoder layers' matrices, and of embeddings and LM head, which need more bits."""

    name: str
    layers: QuantFormat
    tables: QuantFormat

    def apply(self, name: str, weight: StoredWeight) -> StoredWeight:
        """The tensor `name` quantised, or as it is where it is neither of the two.

        Raises:
            InvalidArgumentError: it is quantised already, or its rows are no whole number of groups.
        """
        if _LAYER.fullmatch(name):
            target = self.layers
        elif _TABLE.fullmatch(name):
            target = self.tables
        else:
            return weight
        if len(weight.shape) != 2:
            raise InvalidArgumentError(
                f"quantization={self.name!r}: tensor {name} of shape {tuple(weight.shape)} is no matrix"
            )
        if not isinstance(weight, DenseTensor):
            raise InvalidArgumentError(
                f"quantization={self.name!r}: tensor {name} is quantised already ({_format(weight)}); "
                "a second time would cost accuracy (`flexjudge quantize --to keep` keeps formats)"
            )
        rows, columns = weight.shape
        if columns % target.block_size:
            raise InvalidArgumentError(
                f"quantization={self.name!r}: tensor {name} has {columns} columns, which is no multiple of "
                f"its groups of {target.block_size}"
            )
        return QuantTensor(quantize(weight.to_dense(torch.float32), target.name), target, (rows, columns))


def find_quantization(name: str) -> Quantization | None:
    """The quantisation of this name, if there is one."""
    layers, tables = find_format(_LAYER_FORMATS.get(name, "")), find_format("I8_32")
    return None if layers is None or tables is None else Quantization(name, layers, tables)


@dataclass(frozen=True)
class ActivationQuantization:
    """8 bits for the decoder layers' matrices and for what they are multiplied with; nothing to store.

    dtype: int8 or float8_e4m3fn. Embeddings and LM head stay dense.
    """

    name: str
    dtype: torch.dtype

    def dtype_of(self, name: str, weight: StoredWeight) -> torch.dtype | None:
        """What the layer with the tensor `name` computes in; None: as the weight is.

        Raises:
            InvalidArgumentError: it is quantised already.
        """
        if not _LAYER.fullmatch(name):
            return None
        if not isinstance(weight, DenseTensor):
            raise InvalidArgumentError(
                f"quantization={self.name!r}: tensor {name} is quantised already ({_format(weight)}); "
                "a second time would cost accuracy"
            )
        return self.dtype


def find_activation_quantization(name: str) -> ActivationQuantization | None:
    """The quantisation of weights and activations of this name, if there is one."""
    return ActivationQuantization(name, _EIGHT_BITS[name]) if name in _EIGHT_BITS else None


def _format(weight: StoredWeight) -> str:
    if isinstance(weight, QuantTensor):
        return weight.format.name
    return str(weight.codes.dtype if isinstance(weight, W8Matrix) else weight.data.dtype)
