"""Llama's and Qwen2's pre-norm decoder in plain torch: embeddings, blocks, final norm, LM head."""

from dataclasses import dataclass, replace

import torch

from flexjudge_fast.layers.attention import Attention, AttentionInput
from flexjudge_fast.layers.embedding import Embedding
from flexjudge_fast.layers.linear import Linear
from flexjudge_fast.layers.mlp import GatedMLP
from flexjudge_fast.layers.norm import RMSNorm
from flexjudge_fast.layers.rotary import Rotary
from flexjudge_fast.models.config import DecoderConfig
from flexjudge_fast.models.loader import TensorLoader

# Of most checkpoints, of newer vision-language ones, and of a whole Qwen2.5-Omni.
_PREFIXES = ("model.", "model.language_model.", "thinker.model.")
_HEADS = ("lm_head.", "thinker.lm_head.")


@dataclass(frozen=True)
class DecoderLayer:
    """Attention and MLP, each behind a norm, each added to the residual stream."""

    input_norm: RMSNorm
    attention: Attention
    post_norm: RMSNorm
    mlp: GatedMLP


class Decoder:
    """A Llama-like language model.

    `step` is what the engine calls; `forward` gives hidden states, `logits` float32 logits of some rows.
    """

    def __init__(self, config: DecoderConfig, load: TensorLoader, max_len: int) -> None:
        head_name = load.prefix(_HEADS, "weight") + "weight"
        # A full dump of a Thinker says "tied", the default of transformers, though its head is stored.
        is_tied = config.tie_word_embeddings and head_name not in load.checkpoint.tensor_names()
        self.config = replace(config, tie_word_embeddings=is_tied)
        self.dtype = load.dtype
        table = (config.vocab_size, config.hidden_size)
        prefix = load.prefix(_PREFIXES, "embed_tokens.weight")
        self.embed = Embedding(load.weight(prefix + "embed_tokens.weight", table), load.dtype)
        self.rotary = Rotary(config.rope, max_len, load.device)
        self.layers = [_load_layer(config, load, f"{prefix}layers.{i}.") for i in range(config.num_layers)]
        self.norm = RMSNorm(load.vector(prefix + "norm.weight", config.hidden_size), config.rms_norm_eps)
        self.lm_head = Linear([self.embed.weight if is_tied else load.weight(head_name, table)])

    def forward(self, token_ids: torch.Tensor, inputs: AttentionInput, cache: torch.Tensor) -> torch.Tensor:
        """Run every layer.

        Args:
            token_ids: [num_tokens] int64; from vocab_size on they are rows of `inputs.media`.
            inputs: where the tokens live.
            cache: [num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim], written in place.

        Returns:
            [num_tokens, hidden], after the final norm.
        """
        residual = self.embed(token_ids, inputs.media)  # [num_tokens, hidden]
        angles = self.rotary(inputs.positions, self.dtype)
        x = self.layers[0].input_norm.before(self.layers[0].attention.qkv, residual)
        for layer, layer_cache, following in zip(self.layers, cache, [*self.layers[1:], None], strict=True):
            out = layer.attention(x, angles, layer_cache, inputs)
            x, residual = layer.post_norm.add_before(layer.mlp.gate_up, out, residual)
            out = layer.mlp(x)
            if following is not None:
                x, residual = following.input_norm.add_before(following.attention.qkv, out, residual)
        return self.norm.add(out, residual)[0]

    def step(
        self,
        token_ids: torch.Tensor,
        inputs: AttentionInput,
        cache: torch.Tensor,
        logit_rows: torch.Tensor,
        out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`forward`, then the logits of `logit_rows` [num_rows], in `out` if it is there.

        Returns:
            Logits [num_rows, vocab_size] float32; bool [num_rows], whether a row's are all finite.
        """
        logits = self.lm_head(self.forward(token_ids, inputs, cache)[logit_rows])
        logits = logits.float() if out is None else out.copy_(logits)
        return logits, torch.isfinite(logits).all(-1)


def _load_layer(config: DecoderConfig, load: TensorLoader, prefix: str) -> DecoderLayer:
    attention, mlp = prefix + "self_attn.", prefix + "mlp."
    hidden, intermediate = config.hidden_size, config.intermediate_size
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    qkv_names = [attention + name for name in ("q_proj", "k_proj", "v_proj")]
    gate_up_names = [mlp + "gate_proj", mlp + "up_proj"]
    return DecoderLayer(
        input_norm=RMSNorm(load.vector(prefix + "input_layernorm.weight", hidden), config.rms_norm_eps),
        attention=Attention(
            load.linear(qkv_names, [q_size, kv_size, kv_size], hidden, config.qkv_bias),
            load.linear([attention + "o_proj"], [hidden], q_size, config.out_bias),
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
        ),
        post_norm=RMSNorm(
            load.vector(prefix + "post_attention_layernorm.weight", hidden), config.rms_norm_eps
        ),
        mlp=GatedMLP(
            load.linear(gate_up_names, [intermediate, intermediate], hidden, config.mlp_bias),
            load.linear([mlp + "down_proj"], [hidden], intermediate, config.mlp_bias),
        ),
    )
