"""Qwen2 and Qwen2.5 dense language models: Llama's decoder with biases on q, k and v."""

from flexjudge_fast.models.decoder import Decoder


class Qwen2ForCausalLM(Decoder):
    """The plain decoder; `read_decoder_config` sets `qkv_bias`, which this family always has."""
