"""Writes a tiny Mol-LLaMA with random weights, and perhaps a Llama to judge in place of its own; no judges.

python examples/make_tiny_mol.py tiny-mol [tiny-llama]
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH leaves it out
import make_tiny_vl as vl

# Llama 3's control tokens follow the 256 bytes; a Mol-LLaMA adds two.
CONTROL_TOKENS = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]
ADDED_TOKENS = ["[PAD]", "<mol>"]
ID = {token: 256 + i for i, token in enumerate([*CONTROL_TOKENS, *ADDED_TOKENS])}
HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, HEAD_DIM, RANK = 64, 160, 2, 4, 2, 16, 8
SPACE, SPACE_INNER, SPACE_HEADS, GAUSSIANS, SYMBOLS = 32, 64, 8, 128, 31  # Uni-Mol
GRAPH = 24  # MoleculeSTM
ATOM_FEATURES, BOND_FEATURES = (119, 4, 12, 12, 10, 6, 6, 2, 2), (5, 6, 2)
BLEND = max(SPACE, GRAPH)
QUERIES, QUERY, QUERY_INNER = 8, 48, 96  # the Q-Former
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 256 + len(CONTROL_TOKENS),
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "hidden_act": "silu",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "bos_token_id": ID["<|begin_of_text|>"],
    "eos_token_id": [ID["<|end_of_text|>"], ID["<|eot_id|>"]],
}
CONFIG: dict[str, Any] = {
    "architectures": ["MolLLaMA"],
    "model_type": "mol_llama",
    "llm_config": {"llm_model": "base_llm", "lora_config": {"r": RANK, "lora_alpha": 32}},
    "graph_encoder_config": {"encoder_types": ["unimol", "moleculestm"]},
    "blending_module_config": {"num_layers": LAYERS, "num_heads": 4},
    "qformer_config": {"bert_name": "bert", "cross_attention_freq": 2, "num_query_tokens": QUERIES},
    "torch_dtype": "float32",
}
BERT = {
    "architectures": ["BertForMaskedLM"],
    "model_type": "bert",
    "hidden_act": "gelu",
    "hidden_size": QUERY,
    "intermediate_size": QUERY_INNER,
    "num_attention_heads": 4,
    "num_hidden_layers": LAYERS,
    "layer_norm_eps": 1e-12,
}
Shapes = dict[str, tuple[int, ...]]


def linear(name: str, rows: int, columns: int) -> Shapes:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def norm(name: str, size: int) -> Shapes:
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


def batch_norm(name: str, size: int) -> Shapes:
    return norm(name, size) | {f"{name}.running_mean": (size,), f"{name}.running_var": (size,)}


def llama(vocab: int) -> tuple[Shapes, Shapes]:
    """Projections of the layers, without the `.weight` of their names; and the rest."""
    projections, rest = {}, {"model.norm.weight": (HIDDEN,)}
    rest |= {"model.embed_tokens.weight": (vocab, HIDDEN), "lm_head.weight": (vocab, HIDDEN)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        rest |= {layer + f"{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
        for name, rows in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            projections[f"{layer}self_attn.{name}_proj"] = (rows * HEAD_DIM, HIDDEN)
        projections[layer + "self_attn.o_proj"] = (HIDDEN, HEADS * HEAD_DIM)
        projections |= {f"{layer}mlp.{name}_proj": (INNER, HIDDEN) for name in ("gate", "up")}
        projections[layer + "mlp.down_proj"] = (HIDDEN, INNER)
    return projections, rest


def language_model() -> Shapes:
    """The Llama, with LoRA beside each projection."""
    projections, rest = llama(256 + len(ID))
    prefix = "llm.base_model.model."
    found: Shapes = {prefix + name: shape for name, shape in rest.items()}
    for name, (rows, columns) in projections.items():
        found[f"{prefix}{name}.base_layer.weight"] = (rows, columns)
        found[f"{prefix}{name}.lora_A.default.weight"] = (RANK, columns)
        found[f"{prefix}{name}.lora_B.default.weight"] = (rows, RANK)
    return found


def unimol(prefix: str = "encoder.graph_encoder.unimol.") -> Shapes:
    found: Shapes = {prefix + "embed_tokens.weight": (SYMBOLS, SPACE)}
    found |= {f"{prefix}gbf.{name}.weight": (SYMBOLS**2, 1) for name in ("mul", "bias")}
    found |= {f"{prefix}gbf.{name}.weight": (1, GAUSSIANS) for name in ("means", "stds")}
    found |= linear(prefix + "gbf_proj.linear1", GAUSSIANS, GAUSSIANS)
    found |= linear(prefix + "gbf_proj.linear2", SPACE_HEADS, GAUSSIANS)
    found |= norm(prefix + "encoder.emb_layer_norm", SPACE) | norm(prefix + "encoder.final_layer_norm", SPACE)
    for i in range(LAYERS):
        layer = f"{prefix}encoder.layers.{i}."
        found |= norm(layer + "self_attn_layer_norm", SPACE) | norm(layer + "final_layer_norm", SPACE)
        found |= linear(layer + "self_attn.in_proj", 3 * SPACE, SPACE)
        found |= linear(layer + "self_attn.out_proj", SPACE, SPACE)
        found |= linear(layer + "fc1", SPACE_INNER, SPACE) | linear(layer + "fc2", SPACE, SPACE_INNER)
    return found


def molecule_stm(prefix: str = "encoder.graph_encoder.moleculestm.molecule_node_model.") -> Shapes:
    tables = {"atom_encoder.atom_embedding_list": ATOM_FEATURES}
    found: Shapes = {}
    for i in range(LAYERS):
        layer = f"{prefix}gnns.{i}."
        tables[f"gnns.{i}.bond_encoder.bond_embedding_list"] = BOND_FEATURES
        found[layer + "eps"] = (1,)
        found |= linear(layer + "mlp.0", 2 * GRAPH, GRAPH) | batch_norm(layer + "mlp.1", 2 * GRAPH)
        found |= linear(layer + "mlp.3", GRAPH, 2 * GRAPH) | batch_norm(f"{prefix}batch_norms.{i}", GRAPH)
    for name, sizes in tables.items():
        found |= {f"{prefix}{name}.{i}.weight": (size, GRAPH) for i, size in enumerate(sizes)}
    return found


def blending(prefix: str = "encoder.blending_module.") -> Shapes:
    found = linear(prefix + "mlp.moleculestm.0", BLEND, GRAPH) | linear(prefix + "mlp.unimol.0", BLEND, SPACE)
    names = ("self_attn_block_2D", "self_attn_block_3D", "cross_attn_block_2Dto3D", "cross_attn_block_3Dto2D")
    for block in (f"{prefix}cross_attn_blocks.{i}.{name}." for i in range(LAYERS) for name in names):
        found |= {
            block + "attn.in_proj_weight": (3 * BLEND, BLEND),
            block + "attn.in_proj_bias": (3 * BLEND,),
        }
        found |= linear(block + "attn.out_proj", BLEND, BLEND)
        found |= linear(block + "mlp.0", 4 * BLEND, BLEND) | linear(block + "mlp.2", BLEND, 4 * BLEND)
        for name in ("ln", "ln_q", "ln_k", "ln_v"):
            found |= norm(block + name, BLEND)
    return found


def qformer(prefix: str = "encoder.Qformer.bert.") -> Shapes:
    found = {"encoder.query_tokens": (1, QUERIES, QUERY)} | norm(prefix + "embeddings.LayerNorm", QUERY)
    for i in range(LAYERS):
        layer = f"{prefix}encoder.layer.{i}."
        seen = {"attention.": QUERY} | ({"crossattention.": BLEND} if i % 2 == 0 else {})
        for name, columns in seen.items():
            found |= linear(f"{layer}{name}self.query", QUERY, QUERY)
            found |= linear(f"{layer}{name}self.key", QUERY, columns)
            found |= linear(f"{layer}{name}self.value", QUERY, columns)
            found |= linear(f"{layer}{name}output.dense", QUERY, QUERY)
            found |= norm(f"{layer}{name}output.LayerNorm", QUERY)
        found |= linear(layer + "intermediate_query.dense", QUERY_INNER, QUERY)
        found |= linear(layer + "output_query.dense", QUERY, QUERY_INNER)
        found |= norm(layer + "output_query.LayerNorm", QUERY)
    return found


def shapes() -> Shapes:
    """Every tensor that is used, under its published name."""
    found = language_model() | unimol() | molecule_stm() | blending() | qformer()
    found |= norm("encoder.ln_graph.moleculestm", GRAPH) | norm("encoder.ln_graph.unimol", SPACE)
    return found | linear("llm_proj", HIDDEN, QUERY)


def write(folder: Path, seed: int = 0) -> None:
    """The Mol-LLaMA."""
    folder.mkdir(parents=True, exist_ok=True)
    vl.save_weights(folder, shapes(), seed)
    vl.save_tokenizer(folder, list(ID))
    tokens = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": "[PAD]"}
    files = {"config.json": CONFIG, "base_llm/config.json": LLAMA, "bert/config.json": BERT}
    vl.save_json(folder, files | {"tokenizer_config.json": tokens})


def write_llama(folder: Path, seed: int = 1) -> None:
    """A Llama that can take the place of the Mol-LLaMA's own."""
    folder.mkdir(parents=True, exist_ok=True)
    projections, rest = llama(LLAMA["vocab_size"])
    named = {f"{name}.weight": shape for name, shape in projections.items()}
    vl.save_weights(folder, named | rest, seed)
    vl.save_tokenizer(folder, CONTROL_TOKENS)
    vl.save_json(folder, {"config.json": LLAMA})


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    for path, make in zip(sys.argv[1:], (write, write_llama), strict=False):
        make(Path(path))
        print(f"{path}: random weights, no judge")
