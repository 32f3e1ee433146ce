"""Mol-LLaMA's language model (Kim et al. 2025): a Llama, LoRA merged, its base perhaps a judge's."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from flexjudge_fast.errors import CheckpointError, UnsupportedCheckpointError
from flexjudge_fast.models.config import model_config, read_decoder_config
from flexjudge_fast.models.decoder import Decoder
from flexjudge_fast.models.mol_llama_config import (
    MOL_LLAMA,
    MolLlamaConfig,
    folder_inside,
    is_mol_llama,
    read_mol_llama_config,
)
from flexjudge_fast.weights.checkpoint import Checkpoint, open_checkpoint, read_json
from flexjudge_fast.weights.tensor import DenseTensor, StoredWeight

_STORED = "llm.base_model.model."  # stands before a Llama's names in the checkpoint
_OTHERS = ("encoder.", "llm_proj.")
_EMBED, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_ADDED = 2  # ids behind the base's vocabulary: [PAD], then <mol>
_PROJECTION = re.compile(r"(model\.layers\.\d+\.(?:self_attn|mlp)\.(?:q|k|v|o|gate|up|down)_proj)\.weight")
_FROZEN = {  # what a checkpoint of the trained parts alone lacks
    "encoder.graph_encoder.unimol.": "Uni-Mol (mol_pre_no_h_220816.pt of dptech/Uni-Mol-Models)",
    "encoder.graph_encoder.moleculestm.": "MoleculeSTM (molecule_model.pth of chao1224/MoleculeSTM)",
}


class MolLLaMA(Decoder):
    """The language model, behind `molecule_encoder.py`. Its tensors come from a `MolLlamaCheckpoint`."""


class MolLlamaCheckpoint(Checkpoint):
    """A Mol-LLaMA, presented with the names of a Llama, LoRA merged; the encoders' tensors keep their names.

    Args:
        mol: the checkpoint as published.
        judge: a Llama that takes the place of the base: its layers, norms, LM head and embeddings, save those
            of the two added tokens. LoRA stays.
        base: a Llama with the base's tensors, if `mol` was saved without them; by default the folder inside
            `mol` that its config names.
        ignore: names of unknown config fields to accept unseen.

    Raises:
        CheckpointError: the models do not fit each other.
        UnsupportedCheckpointError: a config asks for other maths.
    """

    def __init__(
        self,
        mol: Checkpoint,
        judge: Checkpoint | None = None,
        base: Checkpoint | None = None,
        ignore: Collection[str] = (),
    ) -> None:
        super().__init__()
        self.path = mol.path
        self.tokenizer_config, self.generation_config = mol.tokenizer_config, mol.generation_config
        molecule = read_mol_llama_config(mol.config, mol.path, ignore)
        if molecule is None:
            raise UnsupportedCheckpointError(f"{mol.path}: config.json is not that of a {MOL_LLAMA}")
        self.molecule: MolLlamaConfig = molecule
        self._mol, self._judge = mol, judge
        self._base = base if base is not None else _open_base(mol.path, molecule.llm_model)
        self._names = frozenset(mol.tensor_names())
        llama = self._llama_config(ignore)
        self.vocab_size = self._vocab_size()
        text = {**llama, "vocab_size": self.vocab_size, "architectures": [MOL_LLAMA]}
        self.config = {**mol.config, "text_config": text}
        self._num_scored = self._count_scored()

    @property
    def mol_token_id(self) -> int:
        """`<mol>`: what stands in a prompt where a molecule's embeddings go; the last id."""
        return self.vocab_size - 1

    @property
    def masked_token_ids(self) -> tuple[int, ...]:
        """Ids that must never be generated: `<mol>`, and those for which the LM head has no row."""
        return tuple(sorted({*range(self._num_scored, self.vocab_size), self.mol_token_id}))

    def tensor_names(self) -> Sequence[str]:
        names: dict[str, None] = {}  # an ordered set
        for name in self._mol.tensor_names():
            plain = name.removeprefix(_STORED).replace(".base_layer.", ".")
            if ".lora_" not in name and (plain != name or name.startswith(_OTHERS)):
                names[plain] = None
        for other in filter(None, (self._judge, self._base)):
            names |= dict.fromkeys(other.tensor_names())
        return tuple(names)

    def tensor(self, name: str) -> StoredWeight:
        if name.startswith(_OTHERS):
            return self._other(name)
        if name == _EMBED:
            return self._embeddings()
        if name == _HEAD:
            return _with_rows(self._plain(_HEAD, self._num_scored), self.vocab_size)
        match = _PROJECTION.fullmatch(name)
        return self._plain(name) if match is None else self._merged(match[1])

    def tokenizer_json(self) -> str:
        return self._mol.tokenizer_json()

    def weight_files(self) -> Sequence[Path]:
        llama = self._llama
        return [*self._mol.weight_files(), *(() if llama is None else llama.weight_files())]

    @property
    def _llama(self) -> Checkpoint | None:
        """Whose tensors come before the Mol-LLaMA's own: the judge's, else the base's."""
        return self._judge if self._judge is not None else self._base

    def _other(self, name: str) -> StoredWeight:
        """A tensor of the encoders or of the projection."""
        frozen = next((prefix for prefix in _FROZEN if name.startswith(prefix)), None)
        if frozen is not None and name not in self._names:
            raise CheckpointError(
                f"{self.path}: tensor {name} is missing. A checkpoint saved without its frozen encoders "
                f"needs them added: convert {_FROZEN[frozen]} to safetensors, with names that begin with "
                f"{frozen}, and put the file into this folder (and into its index, if there is one)"
            )
        return self._mol.tensor(name)

    def _plain(self, name: str, rows: int | None = None, stored: str = "") -> StoredWeight:
        """A tensor of the judge, else of the base. rows: checked in place of the Mol-LLaMA's own number."""
        stored = _STORED + (stored or name)
        if self._judge is None:
            if stored in self._names:
                return self._mol.tensor(stored)
            if self._base is not None:
                return self._base.tensor(name)
            raise CheckpointError(
                f"{self.path}: tensor {stored} is missing. A checkpoint saved without its base needs it: "
                f"put {self.molecule.llm_model} into a folder and pass base_llm= its path, or pass "
                "judge_backbone="
            )
        found = self._judge.tensor(name)
        if stored in self._names:
            wanted = tuple(self._mol.tensor(stored).shape)
            wanted = wanted if rows is None else (rows, *wanted[1:])
            _check(self._judge, name, found, wanted)
        return found

    def _merged(self, name: str) -> StoredWeight:
        """A projection of the base and its LoRA, in float32."""
        stored = f"{_STORED}{name}."
        down, up = (
            self._mol.tensor(f"{stored}lora_{part}.default.weight").to_dense(torch.float32) for part in "AB"
        )
        rank, (rows, columns) = self.molecule.lora_rank, (up.shape[0], down.shape[-1])
        if down.shape != (rank, columns) or up.shape != (rows, rank):
            raise CheckpointError(
                f"{self.path}: tensors {stored}lora_A and lora_B have shapes {tuple(down.shape)} and "
                f"{tuple(up.shape)}, config.json asks for rank {rank}"
            )
        base = self._plain(name + ".weight", stored=name + ".base_layer.weight")
        _check(self, name + ".weight", base, (rows, columns))
        scale = self.molecule.lora_alpha / rank
        return DenseTensor(torch.addmm(base.to_dense(torch.float32), up, down, alpha=scale))

    def _embeddings(self) -> StoredWeight:
        """The judge's or the base's rows; the last two are Mol-LLaMA's, or zeros, for nobody reads them."""
        own = self._mol.tensor(_STORED + _EMBED) if _STORED + _EMBED in self._names else None
        if self._judge is None and own is not None:
            return own
        count, llama = self.vocab_size - _ADDED, self._llama
        if llama is None:
            return self._plain(_EMBED)  # which raises
        rows = _dense(llama.tensor(_EMBED))[:count]
        if own is None:
            return _with_rows(DenseTensor(rows), self.vocab_size)
        added = _dense(own)[count:]
        _check(llama, _EMBED, DenseTensor(rows), (count, *added.shape[1:]))
        return DenseTensor(torch.cat((rows, added)))

    def _vocab_size(self) -> int:
        if _STORED + _EMBED in self._names:
            return int(self._mol.tensor(_STORED + _EMBED).shape[0])
        if self._base is not None:
            return int(self._base.tensor(_EMBED).shape[0]) + _ADDED
        return int(self._plain(_EMBED).shape[0]) + _ADDED

    def _count_scored(self) -> int:
        """Ids that the LM head scores: without the added ones, if a judge without them is its source."""
        if self._judge is None and _STORED + _HEAD in self._names:
            return self.vocab_size
        llama = self._llama
        rows = int((self._plain(_HEAD) if llama is None else llama.tensor(_HEAD)).shape[0])
        least = self.vocab_size - _ADDED
        embedded = rows if llama is None else int(llama.tensor(_EMBED).shape[0])
        if not least <= rows <= self.vocab_size or embedded != rows:
            where = self.path if llama is None else llama.path
            raise CheckpointError(
                f"{where}: {embedded} embeddings and {rows} rows in the LM head, {self.path} asks for "
                f"{least} to {self.vocab_size} of both"
            )
        return rows

    def _llama_config(self, ignore: Collection[str]) -> dict[str, Any]:
        """The base's config.json; a judge's must ask for the same maths."""
        base = self._base.config if self._base is not None else _base_config(self.path, self.molecule)
        judge = None if self._judge is None else _config_of(self._judge)
        found = base if base is not None else judge
        if found is None:
            raise UnsupportedCheckpointError(
                f"config field llm_config.llm_model: {self.molecule.llm_model!r} is no folder inside "
                f"{self.path}; put its config.json into that folder, or pass base_llm= or judge_backbone="
            )
        _check_llama(f"{self.path}: its language model", found)
        if self._judge is not None and judge is not None:
            _check_llama(f"{self._judge.path}: a judge's backbone", judge)
        if base is not None and judge is not None:
            self._check_same(base, judge, ignore)
        return dict(found)

    def _check_same(self, base: Mapping[str, Any], judge: Mapping[str, Any], ignore: Collection[str]) -> None:
        assert self._judge is not None
        one, two = (read_decoder_config(config, ignore) for config in (base, judge))
        two = replace(two, vocab_size=one.vocab_size, max_positions=one.max_positions)
        two = replace(two, rope=replace(two.rope, max_positions=one.rope.max_positions))
        differing = [name for name in vars(one) if getattr(one, name) != getattr(two, name)]
        if differing:
            name = differing[0]
            raise CheckpointError(
                f"{self._judge.path}: {name} is {getattr(two, name)}, the base of {self.path} has "
                f"{getattr(one, name)}"
            )


def open_mol_llama(
    mol: Checkpoint,
    judge_backbone: str | Path | None = None,
    base_llm: str | Path | None = None,
    ignore: Collection[str] = (),
) -> MolLlamaCheckpoint:
    """A `MolLlamaCheckpoint` from an open one, and paths or hub ids of the others."""
    judge, base = (None if other is None else open_checkpoint(other) for other in (judge_backbone, base_llm))
    return MolLlamaCheckpoint(mol, judge, base, ignore)


def _config_of(judge: Checkpoint) -> dict[str, Any]:
    """A judge's config; another Mol-LLaMA has none of the kind."""
    return judge.config if is_mol_llama(judge.config) else model_config(judge.config)


def _check_llama(what: str, config: Mapping[str, Any]) -> None:
    architectures = config.get("architectures")
    if architectures != ["LlamaForCausalLM"] or config.get("tie_word_embeddings"):
        raise UnsupportedCheckpointError(
            f"{what} must be a LlamaForCausalLM with an LM head of its own, not {architectures!r}"
            + (" with tied embeddings" if config.get("tie_word_embeddings") else "")
        )


def _open_base(folder: Path, name: str) -> Checkpoint | None:
    found = folder_inside(folder, name)
    return open_checkpoint(found) if found is not None and any(found.glob("*.safetensors")) else None


def _base_config(folder: Path, molecule: MolLlamaConfig) -> dict[str, Any] | None:
    found = folder_inside(folder, molecule.llm_model)
    return None if found is None else read_json(found / "config.json", required=True)


def _check(where: Checkpoint, name: str, found: StoredWeight, wanted: tuple[int, ...]) -> None:
    if tuple(found.shape) != wanted:
        raise CheckpointError(
            f"{where.path}: tensor {name} has shape {tuple(found.shape)}, the Mol-LLaMA asks for {wanted}"
        )


def _dense(weight: StoredWeight) -> torch.Tensor:
    return weight.data if isinstance(weight, DenseTensor) else weight.to_dense(torch.float32)


def _with_rows(weight: StoredWeight, rows: int) -> StoredWeight:
    """Zeros below, up to `rows`."""
    missing = rows - weight.shape[0]
    if missing == 0:
        return weight
    dense = _dense(weight)
    return DenseTensor(torch.cat((dense, dense.new_zeros(missing, *dense.shape[1:]))))
