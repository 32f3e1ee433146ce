"""Llama (Touvron et al. 2023; Llama 2, 3, SmolLM2): GQA, RoPE, SwiGLU, RMSNorm."""

from flexjudge_fast.models.decoder import Decoder


class LlamaForCausalLM(Decoder):
    """The plain decoder; biases only where `attention_bias` or `mlp_bias` ask for them."""
