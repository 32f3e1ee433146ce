"""Which weights `quantization="int8"` or "int4" quantises, and to what."""

import re
from dataclasses import dataclass

import torch

from flexjudge_fast.errors import InvalidArgumentError
from flexjudge_fast.ops.quantize import quantize
from flexjudge_fast.weights.formats import QuantFormat, find_format
from flexjudge_fast.weights.tensor import QuantTensor, Weight

_LAYER = re.compile(
    r"(model\.|model\.language_model\.|thinker\.model\.)?layers\.\d+\.(self_attn|mlp)\.\w+_proj\.weight"
)
_TABLE = re.compile(r"((.+\.)?embed_tokens|(thinker\.)?lm_head)\.weight")
# What `flexjudge quantize` writes as config.json's `quantization_config`.
OWN_CONFIG = {"quant_method": "flexjudge", "version": 1}
_LAYER_FORMATS = {"int8": "I8_32", "int4": "Q4_1", "int4-g64": "I4_64", "int4-g128": "I4_128"}
QUANTIZATIONS = tuple(_LAYER_FORMATS)


@dataclass(frozen=True)
class Quantization:
    """Formats of the decoder layers' matrices, and of embeddings and LM head, which need more bits."""

    name: str
    layers: QuantFormat
    tables: QuantFormat

    def apply(self, name: str, weight: Weight) -> Weight:
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
        if isinstance(weight, QuantTensor):
            raise InvalidArgumentError(
                f"quantization={self.name!r}: tensor {name} is quantised already ({weight.format.name}); "
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
