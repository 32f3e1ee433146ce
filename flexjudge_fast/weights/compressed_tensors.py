"""compressed-tensors (llm-compressor): packed 4- or 8-bit weights, or 8 bits for weights and activations."""

from dataclasses import dataclass

import torch

from flexjudge_fast.ops.linear_w8a8 import W8Matrix
from flexjudge_fast.weights.layout import (
    SCALE_DTYPES,
    Fields,
    Layout,
    Module,
    check_groups,
    num_groups,
    unpack_words,
    zero_point_weight,
)
from flexjudge_fast.weights.tensor import QuantTensor, StoredWeight

_FORMATS = ("pack-quantized", "int-quantized", "float-quantized")
_HARMLESS = frozenset(["quant_method", "version", "global_compression_ratio"])
_HARMLESS_ARGS = frozenset(["observer", "observer_kwargs", "scale_dtype", "zp_dtype"])


@dataclass(frozen=True)
class _Scheme:
    """bits: of a weight. group_size: -1: a scale per row; 0: one in all. eight_bits: activations too."""

    bits: int
    group_size: int
    symmetric: bool
    eight_bits: bool


class CompressedTensors(Layout):
    """Tensors, for a matrix [out, in] of signed codes c with zero points z; a weight is scale * (c - z).

    "pack-quantized", with `n` = 32 / bits: weight_packed int32 [out, in / n rounded up], of c + 2^(bits - 1);
    weight_scale [out, groups]; weight_zero_point int32 [out / n rounded up, groups], packed likewise, or int8
    [out, groups]; weight_shape [2].
    "int-quantized" and "float-quantized": weight int8 or float8_e4m3fn [out, in], weight_scale [out, 1] or
    one number; activations are quantised token by token, which needs a GPU: see `W8Matrix`.

    What is quantised shows in the tensors, so that no pattern of `targets` and `ignore` is ever run: an
    untrusted regular expression can take forever. All groups must have the same scheme.

    Raises:
        UnsupportedCheckpointError: a field asks for something else.
    """

    def __init__(self, fields: Fields) -> None:
        self.format = fields.one_of("format", _FORMATS)
        statuses = ("compressed", "frozen")  # what early writers said of the same tensors
        fields.one_of("quantization_status", statuses, "compressed")
        self.ignored = tuple(name for name in fields.names("ignore") if not name.startswith("re:"))
        sparsity = fields.take("sparsity_config", {})
        if not isinstance(sparsity, dict) or sparsity.get("format", "dense") != "dense":
            raise fields.error("sparsity_config", sparsity, "sparse weights are not supported")
        schemes = [self._scheme(group) for group in fields.children("config_groups")]
        if not schemes or any(scheme != schemes[0] for scheme in schemes):
            raise fields.error("config_groups", schemes, "one scheme for all modules is expected")
        fields.finish(_HARMLESS)
        self.scheme = schemes[0]
        common = ("weight_scale", "weight_zero_point", "weight_g_idx")
        packed = ("weight_packed", "weight_shape", *common)
        self.parts = packed if self.format == "pack-quantized" else ("weight", *common)
        activations = ", activations of 8 bits" if self.scheme.eight_bits else ""
        self.summary = f"compressed-tensors, {self.format}, {self.scheme.bits} bits{activations}"

    def _scheme(self, group: Fields) -> _Scheme:
        group.names("targets")
        group.one_of("format", (self.format,), self.format)
        weights = group.child("weights")
        is_float, is_packed = self.format == "float-quantized", self.format == "pack-quantized"
        scheme = _read_weights(weights, is_float, is_packed)
        if not is_packed:
            _check_activations(group.child("input_activations"), is_float)
        group.finish(())  # activations of packed weights, or of outputs
        return scheme

    def weight(self, module: Module) -> StoredWeight:
        return self._eight_bits(module) if self.scheme.eight_bits else self._packed(module)

    def _packed(self, module: Module) -> QuantTensor:
        bits = self.scheme.bits
        per_word, middle = 32 // bits, 1 << (bits - 1)
        shape = module.take("weight_shape", (torch.int32, torch.int64), (2,)).tolist()
        rows, columns = int(shape[0]), int(shape[1])
        if rows <= 0 or columns <= 0:
            raise module.error("weight_shape", f"is {shape}")
        words = module.take("weight_packed", (torch.int32,), (rows, -(-columns // per_word)))
        groups = num_groups(module, "weight_packed", columns, self.scheme.group_size)
        check_groups(module, "weight_g_idx", columns, self.scheme.group_size)
        scales = module.take("weight_scale", SCALE_DTYPES, (rows, groups))
        zeros = torch.full((rows, groups), middle, dtype=torch.uint8)
        if not self.scheme.symmetric:
            zeros = self._zeros(module, rows, groups)
        elif "weight_zero_point" in module.parts and not torch.equal(
            self._zeros(module, rows, groups), zeros
        ):
            raise module.error("weight_zero_point", "is not zero, the config says symmetric")
        return zero_point_weight(unpack_words(words, bits)[:, :columns], scales, zeros, bits)

    def _zeros(self, module: Module, rows: int, groups: int) -> torch.Tensor:
        """Of the packed codes: uint8 [rows, groups]."""
        bits = self.scheme.bits
        found = module.take("weight_zero_point", (torch.int32, torch.int8), (None, groups))
        if found.dtype == torch.int32:
            found = module.take("weight_zero_point", (torch.int32,), (-(-rows * bits // 32), groups))
            return unpack_words(found.T, bits).T[:rows].contiguous()
        wide = module.take("weight_zero_point", (torch.int8,), (rows, groups)).int() + (1 << (bits - 1))
        if bool(((wide < 0) | (wide >= 1 << bits)).any()):
            raise module.error("weight_zero_point", f"is beyond {bits} bits")
        return wide.to(torch.uint8)

    def _eight_bits(self, module: Module) -> W8Matrix:
        dtype = torch.float8_e4m3fn if self.format == "float-quantized" else torch.int8
        codes = module.take("weight", (dtype,), (None, None))
        if "weight_zero_point" in module.parts:
            zeros = module.take("weight_zero_point", (torch.int8, dtype), (None, 1))
            if bool((zeros.float() != 0).any()):
                raise module.error("weight_zero_point", "is not zero, the config says symmetric")
        shape = (1,) if self.scheme.group_size == 0 else (codes.shape[0], 1)
        scales = module.take("weight_scale", SCALE_DTYPES, shape).float().flatten()
        return W8Matrix(codes, scales.expand(codes.shape[0]).contiguous())


def _read_weights(weights: Fields, is_float: bool, is_packed: bool) -> _Scheme:
    bits = int(weights.one_of("num_bits", (4, 8) if is_packed else (8,)))
    weights.one_of("type", ("float",) if is_float else ("int",), "int")
    symmetric = bool(weights.one_of("symmetric", (True, False) if is_packed else (True,), True))
    weights.one_of("dynamic", (False,), False)
    weights.one_of("actorder", ("weight", "static", "none"), "none")
    strategy = weights.one_of("strategy", ("group", "channel") if is_packed else ("channel", "tensor"))
    group_size = weights.group_size(default=-1)
    if (strategy == "group") != (group_size != -1):
        raise weights.error("group_size", group_size, f"does not go with the strategy {strategy!r}")
    weights.finish(_HARMLESS_ARGS)
    return _Scheme(bits, 0 if strategy == "tensor" else group_size, symmetric, not is_packed)


def _check_activations(inputs: Fields, is_float: bool) -> None:
    """8 bits, a scale per token that is found on the way."""
    inputs.one_of("num_bits", (8,))
    inputs.one_of("type", ("float",) if is_float else ("int",), "int")
    inputs.one_of("symmetric", (True,), True)
    inputs.one_of("dynamic", (True,))
    inputs.one_of("strategy", ("token",))
    inputs.finish(_HARMLESS_ARGS)
