"""AWQ as AutoAWQ's `gemm` version stores it: 4-bit codes packed along the output features, interleaved."""

import torch

from flexjudge_fast.weights.layout import (
    SCALE_DTYPES,
    Fields,
    Layout,
    Module,
    num_groups,
    unpack_words,
    zero_point_weight,
)
from flexjudge_fast.weights.tensor import QuantTensor

_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]  # output feature i of eight is the nibble _PLACES[i] of its word
_HARMLESS = frozenset(
    [
        "quant_method",
        "do_fuse",
        "fuse_max_seq_len",
        "modules_to_fuse",
        "exllama_config",
        "method",
        "sym",
        "lm_head",
        "true_sequential",
        "damp_percent",
        "act_group_aware",
        "batch_size",
        "cache_block_outputs",
        "meta",
    ]
)


class Awq(Layout):
    """Tensors, for a matrix [out, in]: qweight int32 [in, out / 8]; qzeros int32 [groups, out / 8]; scales
    [groups, out]. A weight is scale * (code - zero).

    Raises:
        UnsupportedCheckpointError: a field asks for something else.
    """

    parts = ("qweight", "qzeros", "scales")

    def __init__(self, fields: Fields) -> None:
        fields.one_of("bits", (4,))
        self.group_size = fields.group_size()
        for name in ("version", "format", "checkpoint_format"):  # the same under several names
            fields.one_of(name, ("gemm", "GEMM"), "gemm")
        fields.one_of("zero_point", (True,), True)
        fields.one_of("pack_dtype", ("int32",), "int32")
        fields.one_of("backend", ("autoawq", "auto"), "autoawq")
        self.ignored = fields.names("modules_to_not_convert")
        fields.finish(_HARMLESS)
        self.summary = f"awq, 4 bits, groups of {self.group_size}"

    def weight(self, module: Module) -> QuantTensor:
        words = module.take("qweight", (torch.int32,), (None, None))
        columns, rows = words.shape[0], words.shape[1] * 8
        groups = num_groups(module, "qweight", columns, self.group_size)
        zero_words = module.take("qzeros", (torch.int32,), (groups, rows // 8))
        scales = module.take("scales", SCALE_DTYPES, (groups, rows))
        return zero_point_weight(_unpack(words), scales.T, _unpack(zero_words), 4)


def _unpack(words: torch.Tensor) -> torch.Tensor:
    """int32 [n, rows / 8] to uint8 [rows, n]."""
    eights = unpack_words(words, 4).unflatten(1, (-1, 8))  # [n, rows / 8, 8]
    codes: torch.Tensor = eights[:, :, _PLACES].flatten(1).T.contiguous()
    return codes
