"""Builds a `tokenizer.json` out of a GGUF file's tokenizer metadata."""

import json
from collections.abc import Callable
from typing import Any

from flexjudge_fast.errors import UnsupportedCheckpointError

_CONTROL, _USER_DEFINED = 3, 4  # gguf.TokenType
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}


def build_tokenizer_json(value: Callable[[str], Any], source: str) -> str:
    """The JSON that the `tokenizers` library reads.

    Args:
        value: metadata by key, `None` when missing.
        source: the file, for errors.

    Raises:
        UnsupportedCheckpointError: not a byte-level BPE, or an unknown pre-tokenizer.
    """
    model = value("tokenizer.ggml.model")
    if model != "gpt2":
        raise UnsupportedCheckpointError(
            f"{source}: tokenizer.ggml.model {model!r} is not supported (byte-level BPE, 'gpt2', is)"
        )
    pre = value("tokenizer.ggml.pre") or "default"
    pre_tokenizers = _pre_tokenizers()
    if pre not in pre_tokenizers:
        raise UnsupportedCheckpointError(
            f"{source}: tokenizer.ggml.pre {pre!r} is not supported ({', '.join(sorted(pre_tokenizers))} are)"
        )
    tokens = value("tokenizer.ggml.tokens")
    types = value("tokenizer.ggml.token_type") or [1] * len(tokens)
    added = [
        {
            "id": i,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind == _CONTROL,
        }
        for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    merges = [merge.split(" ", 1) for merge in value("tokenizer.ggml.merges")]
    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": pre_tokenizers[pre]},
        "post_processor": _begin_of_text(value, tokens),
        "decoder": {**_BYTE_LEVEL, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": pre == "llama-bpe",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": merges,
        },
    }
    return json.dumps(spec, ensure_ascii=False)


def _pre_tokenizers() -> dict[str, list[dict[str, Any]]]:
    """How the published tokenizers of each family cut text before the merges."""

    def split(regex: str) -> list[dict[str, Any]]:
        cut = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
        return [cut, _BYTE_LEVEL]

    gpt2 = {**_BYTE_LEVEL, "use_regex": True}
    return {
        "qwen2": split(_QWEN2),
        "llama-bpe": split(_LLAMA3),
        "smollm": [{"type": "Digits", "individual_digits": True}, gpt2],
        "gpt-2": [gpt2],
    }


def _begin_of_text(value: Callable[[str], Any], tokens: list[str]) -> dict[str, Any] | None:
    if not value("tokenizer.ggml.add_bos_token"):
        return None
    token_id = value("tokenizer.ggml.bos_token_id")
    token = tokens[token_id]
    begin = {"SpecialToken": {"id": token, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [begin, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {token: {"id": token, "ids": [token_id], "tokens": [token]}},
    }
