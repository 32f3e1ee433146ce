"""Which fields of a config.json may be passed over; every reader of one of its parts asks here."""

from collections.abc import Collection, Mapping
from typing import Any

from flexjudge_fast.errors import UnsupportedCheckpointError

# Fields that transformers may write into any part, as it does where it writes all: names, classes, special
# tokens, defaults of `generate`, what a model returns, what training alone reads. No logit depends on them.
_HARMLESS = frozenset(
    [
        "_attn_implementation_autoset",
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "bad_words_ids",
        "begin_suppress_tokens",
        "bos_token_id",
        "chunk_size_feed_forward",
        "cross_attention_hidden_size",
        "decoder_start_token_id",
        "diversity_penalty",
        "do_sample",
        "dtype",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "eos_token_id",
        "exponential_decay_length_penalty",
        "finetuning_task",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "id2label",
        "init_std",
        "initializer_range",
        "is_decoder",
        "is_encoder_decoder",
        "label2id",
        "length_penalty",
        "max_length",
        "min_length",
        "model_type",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "output_attentions",
        "output_hidden_states",
        "output_scores",
        "pad_token_id",
        "prefix",
        "problem_type",
        "remove_invalid_values",
        "repetition_penalty",
        "return_dict",
        "return_dict_in_generate",
        "sep_token_id",
        "suppress_tokens",
        "task_specific_params",
        "temperature",
        "tf_legacy_loss",
        "tie_encoder_decoder",
        "tie_word_embeddings",
        "tokenizer_class",
        "top_k",
        "top_p",
        "torch_dtype",
        "torchscript",
        "transformers_version",
        "typical_p",
        "use_bfloat16",
        "use_cache",
    ]
)
_FIXED: dict[str, Any] = {"pruned_heads": {}}  # a full dump says that no head was taken out


def refuse_unknown(
    config: Mapping[str, Any],
    known: Collection[str],
    ignore: Collection[str],
    part: str = "",
    fixed: Mapping[str, Any] | None = None,
) -> None:
    """Refuse fields of a part of a config.json that may change the maths.

    Null and false say nothing, whatever the field.

    Args:
        known: names of fields that are read elsewhere, or change no number.
        ignore: names of fields to accept unseen.
        part: its name with a dot behind it, for messages; empty for the outermost.
        fixed: fields whose maths is built in, and the value that asks for it.

    Raises:
        UnsupportedCheckpointError: it names the field.
    """
    fixed = {**_FIXED, **(fixed or {})}
    for name, value in config.items():
        if value is None or value is False or name in ignore:
            continue
        if name in fixed:
            if value != fixed[name]:
                raise UnsupportedCheckpointError(
                    f"config field {part}{name}: {value!r}, only {fixed[name]!r} is supported"
                )
        elif name not in known and name not in _HARMLESS:
            raise UnsupportedCheckpointError(
                f"config field {part}{name}={value!r} is unknown and may change the maths; "
                f"pass ignore_config=[{name!r}] if it does not"
            )
