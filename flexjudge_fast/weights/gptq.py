"""GPTQ: 4- or 8-bit codes packed down the input features, a scale and a zero point per group of them."""

import torch

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
from flexjudge_fast.weights.tensor import QuantTensor

# About how codes were found, not what they mean.
_HARMLESS = frozenset(
    [
        "quant_method",
        "method",
        "sym",
        "true_sequential",
        "damp_percent",
        "damp_auto_increment",
        "static_groups",
        "act_group_aware",
        "mse",
        "lm_head",
        "meta",
        "dataset",
        "tokenizer",
        "batch_size",
        "pad_token_id",
        "model_name_or_path",
        "model_file_base_name",
        "model_seqlen",
        "block_name_to_quantize",
        "module_name_preceding_first_block",
        "modules_in_block_to_quantize",
        "cache_block_outputs",
        "max_input_length",
        "backend",
        "use_cuda_fp16",
        "use_exllama",
        "disable_exllama",
        "exllama_config",
        "pack_impl",
        "offload_to_disk",
        "offload_to_disk_path",
    ]
)


class Gptq(Layout):
    """Tensors, for a matrix [out, in] with `n` = 32 / bits codes a word, the first in the lowest bits:

    qweight int32 [in / n, out]; qzeros int32 [groups, out / n]; scales [groups, out]; g_idx int32 [in].
    A weight is scale * (code - zero). The format "gptq" stores zero - 1, "gptq_v2" stores the zero itself.

    Raises:
        UnsupportedCheckpointError: a field asks for something else.
    """

    parts = ("qweight", "qzeros", "scales", "g_idx")

    def __init__(self, fields: Fields) -> None:
        self.bits = int(fields.one_of("bits", (4, 8)))
        self.group_size = fields.group_size()
        formats = ("gptq", "gptq_v2")
        name = fields.one_of("checkpoint_format", formats, "gptq")
        fields.one_of("format", (name,), name)  # the same under another name
        self.zero_is_less_one = name == "gptq"
        self.says_order = bool(fields.one_of("desc_act", (False, True), False))
        fields.one_of("pack_dtype", ("int32",), "int32")
        dynamic = fields.take("dynamic", {})
        if not isinstance(dynamic, dict) or any(not key.startswith("-:") for key in dynamic):
            raise fields.error("dynamic", dynamic, "modules with settings of their own are not supported")
        fields.finish(_HARMLESS)
        self.summary = f"{name}, {self.bits} bits, groups of {self.group_size}"

    def weight(self, module: Module) -> QuantTensor:
        per_word = 32 // self.bits
        words = module.take("qweight", (torch.int32,), (None, None))
        columns, rows = words.shape[0] * per_word, words.shape[1]
        if rows % per_word:
            raise module.error("qweight", f"has {rows} output features, no whole number of words")
        groups = num_groups(module, "qweight", columns, self.group_size)
        if self.says_order and self.group_size != -1 and "g_idx" not in module.parts:
            raise module.error("g_idx", "is missing, and desc_act is true: columns may be in any order")
        check_groups(module, "g_idx", columns, self.group_size)
        zero_words = module.take("qzeros", (torch.int32,), (groups, rows // per_word))
        zeros = unpack_words(zero_words, self.bits)  # [groups, rows]
        if self.zero_is_less_one:
            if bool((zeros == (1 << self.bits) - 1).any()):  # -1, borrowed from its neighbour or not
                raise module.unsupported(
                    "qzeros", "holds zero points of 0, which writers of checkpoint_format 'gptq' disagree on"
                )
            zeros = zeros + 1
        scales = module.take("scales", SCALE_DTYPES, (groups, rows))
        codes = unpack_words(words.T, self.bits)  # [rows, columns]
        return zero_point_weight(codes, scales.T, zeros.T, self.bits)
