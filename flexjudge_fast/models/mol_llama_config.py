"""Reads the composite `config.json` of a Mol-LLaMA; refuses what it would have to guess."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexjudge_fast.errors import UnsupportedCheckpointError
from flexjudge_fast.models.config_fields import refuse_unknown
from flexjudge_fast.weights.checkpoint import read_json

MOL_LLAMA = "MolLLaMA"
_ENCODERS = ["unimol", "moleculestm"]
# Names of files that were read before the training, and what tensors tell or training alone needed.
_HARMLESS = frozenset(
    ["repo_id", "filename", "weights_filename", "dictionary_filename", "embed_dim", "lora_dropout"]
)
_BERT_HARMLESS = frozenset(
    [
        "attention_probs_dropout_prob",
        "classifier_dropout",
        "gradient_checkpointing",
        "hidden_dropout_prob",
        "max_position_embeddings",
        "position_embedding_type",
        "type_vocab_size",
        "vocab_size",
    ]
)
# Of bases that a published config.json names by their hub id, without their files.
_PUBLISHED_BERTS = {
    "allenai/scibert_scivocab_uncased": {
        "num_hidden_layers": 12,
        "hidden_size": 768,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "layer_norm_eps": 1e-12,
    }
}


@dataclass(frozen=True)
class QFormerConfig:
    """A Q-Former, sized as its BERT; every `cross_attention_freq`-th layer sees the molecule."""

    num_queries: int
    cross_attention_freq: int
    num_layers: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    norm_eps: float


@dataclass(frozen=True)
class MolLlamaConfig:
    """What the tensors of a Mol-LLaMA do not tell. `llm_model`: path or hub id of the base."""

    llm_model: str
    lora_rank: int
    lora_alpha: float
    blending_layers: int
    blending_heads: int
    qformer: QFormerConfig


def is_mol_llama(config: Mapping[str, Any]) -> bool:
    return config.get("architectures") == [MOL_LLAMA]


def read_mol_llama_config(
    config: Mapping[str, Any], folder: Path, ignore: Collection[str] = ()
) -> MolLlamaConfig | None:
    """The molecule part of a checkpoint's config; `None` for another model.

    Args:
        folder: the checkpoint's, in which the Q-Former's BERT is looked for.
        ignore: names of unknown fields to accept unseen.

    Raises:
        UnsupportedCheckpointError: a field is missing, unknown, or asks for other maths.
    """
    if not is_mol_llama(config):
        return None
    parts = ("llm_config", "graph_encoder_config", "blending_module_config", "qformer_config", "text_config")
    refuse_unknown(config, {*parts, *_HARMLESS}, ignore)
    llm = _part(config, "llm_config", ("llm_model", "lora_config"), ignore)
    lora = _part(llm, "lora_config", ("r", "lora_alpha"), ignore)
    graph = _part(
        config, "graph_encoder_config", ("encoder_types", "unimol_config", "moleculestm_config"), ignore
    )
    for name in ("unimol_config", "moleculestm_config"):
        _part(graph, name, (), ignore)
    if sorted(graph.get("encoder_types") or _ENCODERS) != sorted(_ENCODERS):
        raise UnsupportedCheckpointError(
            f"config field encoder_types: {graph['encoder_types']!r}, only {_ENCODERS!r} is supported"
        )
    blending = _part(config, "blending_module_config", ("num_layers", "num_heads"), ignore)
    qformer = _part(
        config, "qformer_config", ("bert_name", "cross_attention_freq", "num_query_tokens"), ignore
    )
    if not isinstance(llm.get("llm_model"), str):
        raise UnsupportedCheckpointError("config field llm_config.llm_model: a path or a hub id is expected")
    alpha = lora.get("lora_alpha", 32)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise UnsupportedCheckpointError(f"config field lora_config.lora_alpha: {alpha!r} is not a number")
    return MolLlamaConfig(  # the defaults are those of the reference
        llm_model=llm["llm_model"],
        lora_rank=_positive(lora, "r", 8),
        lora_alpha=float(alpha),
        blending_layers=_positive(blending, "num_layers", 4),
        blending_heads=_positive(blending, "num_heads", 8),
        qformer=_read_qformer(qformer, folder, ignore),
    )


def folder_inside(folder: Path, name: str) -> Path | None:
    """The folder that a config names relative to its own; `None` if it is not there, or not inside."""
    root = folder.resolve()
    path = (root / name).resolve()
    return path if root in path.parents and path.is_dir() else None


def _read_qformer(qformer: Mapping[str, Any], folder: Path, ignore: Collection[str]) -> QFormerConfig:
    name = qformer.get("bert_name") or "allenai/scibert_scivocab_uncased"
    found = folder_inside(folder, str(name))
    if found is not None:
        bert = read_json(found / "config.json", required=True)
    elif name in _PUBLISHED_BERTS:
        bert = _PUBLISHED_BERTS[name]
    else:
        raise UnsupportedCheckpointError(
            f"config field qformer_config.bert_name: {name!r} is no folder inside {folder}; "
            "put the config.json of this BERT there"
        )
    sizes = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
    refuse_unknown(bert, {*sizes, "layer_norm_eps", *_BERT_HARMLESS}, ignore, fixed={"hidden_act": "gelu"})
    layers, hidden, heads, inner = (_positive(bert, field) for field in sizes)
    eps = bert.get("layer_norm_eps", 1e-12)
    if not isinstance(eps, float) or hidden % heads:
        raise UnsupportedCheckpointError(
            f"{name}: layer_norm_eps={eps!r}, hidden_size={hidden}, num_attention_heads={heads} do not fit"
        )
    return QFormerConfig(
        num_queries=_positive(qformer, "num_query_tokens", 8),
        cross_attention_freq=_positive(qformer, "cross_attention_freq", 2),
        num_layers=layers,
        hidden_size=hidden,
        num_heads=heads,
        intermediate_size=inner,
        norm_eps=eps,
    )


def _part(
    config: Mapping[str, Any], name: str, fields: Collection[str], ignore: Collection[str]
) -> Mapping[str, Any]:
    """An inner object with known fields only; empty if it is missing, as transformers leaves out defaults."""
    part = config.get(name)
    if part is None:
        return {}
    if not isinstance(part, Mapping):
        raise UnsupportedCheckpointError(f"config field {name}: an object is expected")
    refuse_unknown(part, {*fields, *_HARMLESS}, ignore, name + ".")
    return part


def _positive(part: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = part.get(name, default)
    if type(value) is not int or value <= 0:
        raise UnsupportedCheckpointError(f"config field {name}: {value!r} is not a positive integer")
    return value
