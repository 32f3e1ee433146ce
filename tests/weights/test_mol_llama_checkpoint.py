"""A Mol-LLaMA that lacks parts, holds broken ones, or meets a judge that does not fit: typed errors."""

import json
import runpy
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flexjudge_fast.errors import CheckpointError, InvalidArgumentError, UnsupportedCheckpointError
from flexjudge_fast.models.config import model_config, read_decoder_config
from flexjudge_fast.models.mol_llama_config import QFormerConfig, folder_inside, read_mol_llama_config
from flexjudge_fast.models.registry import load_model, load_molecule, open_model
from flexjudge_fast.weights.checkpoint import open_checkpoint
from tests.golden_molecules import REDUCED

CPU = torch.device("cpu")
LLM = "llm.base_model.model."


@pytest.fixture
def folder(tmp_path):
    """A copy that a test may break."""
    return shutil.copytree(REDUCED / "checkpoint", tmp_path / "mol", copy_function=shutil.copyfile)


@pytest.fixture
def judge(tmp_path):
    source = REDUCED / "judge_merge" / "judge_llm"
    return shutil.copytree(source, tmp_path / "judge", copy_function=shutil.copyfile)


def rewrite(folder, change):
    """Change the tensors of a folder in place."""
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    save_file(change(tensors), path, {"format": "pt"})


def edit(folder, *place, **fields):
    """Set fields of config.json, in the object at `place`."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    part = config
    for name in place:
        part = part[name]
    part |= fields
    path.write_text(json.dumps(config))


def load(folder, **options):
    checkpoint = open_model(folder, **options)
    config = read_decoder_config(model_config(checkpoint.config))
    model = load_model(checkpoint, config, torch.float32, CPU, 64)
    return checkpoint, model, load_molecule(checkpoint, config, CPU)


def without(*prefixes):
    return lambda tensors: {n: t for n, t in tensors.items() if not n.startswith(prefixes)}


def base_only(name):
    return "lora_" not in name and name.startswith(LLM)


@pytest.mark.parametrize(
    ("part", "source"),
    [("unimol", "mol_pre_no_h_220816.pt"), ("moleculestm", "molecule_model.pth")],
)
def test_frozen_encoders_missing(folder, part, source):
    rewrite(folder, without(f"encoder.graph_encoder.{part}."))
    with pytest.raises(CheckpointError, match=f"encoder.graph_encoder.{part}.*{source}"):
        load(folder)


def test_base_missing(folder, judge, tmp_path):
    """Then it comes from `base_llm`, from the folder that the config names, or a judge is enough."""
    whole = load_file(folder / "model.safetensors")
    rewrite(folder, lambda tensors: {n: t for n, t in tensors.items() if not base_only(n)})
    with pytest.raises(CheckpointError, match=r"base_llm=.*judge_backbone="):
        open_model(folder)
    base = {n.removeprefix(LLM).replace(".base_layer", ""): t for n, t in whole.items() if base_only(n)}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        base[name] = base[name][:588].clone()
    elsewhere = tmp_path / "base"
    shutil.copytree(folder / "base_llm", elsewhere)
    save_file(base, elsewhere / "model.safetensors", {"format": "pt"})
    wanted = open_model(REDUCED / "checkpoint")
    given = open_model(folder, base_llm=elsewhere)
    shutil.copy(elsewhere / "model.safetensors", folder / "base_llm")
    for checkpoint in (given, open_model(folder)):
        assert checkpoint.masked_token_ids == (588, 589)
        assert len(checkpoint.weight_files()) == 2
        for name in wanted.tensor_names():
            if name.startswith(("model.", "lm_head.")):
                rows = 588 if name in ("model.embed_tokens.weight", "lm_head.weight") else None
                assert torch.equal(checkpoint.tensor(name).data[:rows], wanted.tensor(name).data[:rows]), name
    (folder / "base_llm" / "model.safetensors").unlink()
    load(folder, judge_backbone=judge)


def test_base_config_from_the_judge(folder, judge):
    shutil.rmtree(folder / "base_llm")
    with pytest.raises(UnsupportedCheckpointError, match=r"llm_model: 'base_llm'.*judge_backbone="):
        open_model(folder)
    load(folder, judge_backbone=judge)


@pytest.mark.parametrize("name", ["lora_A", "lora_B"])
def test_lora_of_another_rank(folder, name):
    stored = f"{LLM}model.layers.1.mlp.up_proj.{name}.default.weight"

    def cut(tensors):
        tensors[stored] = tensors[stored][:4].clone() if name == "lora_A" else tensors[stored][:, :4].clone()
        return tensors

    rewrite(folder, cut)
    with pytest.raises(CheckpointError, match=r"up_proj.*asks for rank 8"):
        load(folder)


def test_lora_missing(folder):
    rewrite(folder, without(f"{LLM}model.layers.0.self_attn.q_proj.lora_B"))
    with pytest.raises(CheckpointError, match=r"q_proj\.lora_B\.default\.weight is missing"):
        load(folder)


def test_infinite_lora(folder):
    stored = f"{LLM}model.layers.0.mlp.down_proj.lora_B.default.weight"
    rewrite(folder, lambda tensors: tensors | {stored: torch.full_like(tensors[stored], torch.inf)})
    with pytest.raises(CheckpointError, match=r"down_proj.weight holds NaN or infinite"):
        load(folder)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.layers.0.mlp.up_proj.weight", (96, 64)),
        ("model.layers.0.input_layernorm.weight", (32,)),
        ("model.norm.weight", (65,)),
        ("model.embed_tokens.weight", (588, 32)),
        ("lm_head.weight", (588, 32)),
    ],
)
def test_judge_of_another_shape(judge, name, shape):
    rewrite(judge, lambda tensors: tensors | {name: torch.zeros(shape)})
    with pytest.raises(CheckpointError, match=f"judge: tensor {name} has shape"):
        load(REDUCED / "checkpoint", judge_backbone=judge)


@pytest.mark.parametrize("rows", [580, 600])
def test_judge_of_another_vocabulary(judge, rows):
    tables = {"model.embed_tokens.weight": torch.zeros(rows, 64), "lm_head.weight": torch.zeros(rows, 64)}
    rewrite(judge, lambda tensors: tensors | tables)
    with pytest.raises(CheckpointError, match=f"{rows} embeddings.*588 to 590"):
        open_model(REDUCED / "checkpoint", judge_backbone=judge)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": 1}, "num_layers is 1"),
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps is 1e-06"),
        ({"rope_theta": 10000.0}, "rope is"),
        ({"architectures": ["Qwen2ForCausalLM"]}, "must be a LlamaForCausalLM"),
        ({"tie_word_embeddings": True}, "LM head of its own"),
    ],
)
def test_judge_with_other_maths(judge, fields, message):
    edit(judge, **fields)
    with pytest.raises(CheckpointError, match=message):
        open_model(REDUCED / "checkpoint", judge_backbone=judge)


def test_judge_that_is_a_mol_llama(folder):
    with pytest.raises(UnsupportedCheckpointError, match=r"mol: a judge's backbone must be .*'MolLLaMA'"):
        open_model(REDUCED / "checkpoint", judge_backbone=folder)


def test_judge_without_a_tensor(judge):
    rewrite(judge, without("model.layers.1.mlp.gate_proj"))
    with pytest.raises(CheckpointError, match=r"judge: tensor model\.layers\.1\.mlp\.gate_proj"):
        load(REDUCED / "checkpoint", judge_backbone=judge)


def test_backbone_for_another_model(judge):
    with pytest.raises(InvalidArgumentError, match=r"judge_backbone.*is no Mol-LLaMA"):
        open_model(judge, judge_backbone=judge)
    assert type(open_model(judge)) is type(open_checkpoint(judge))


@pytest.mark.parametrize(
    ("place", "fields", "message"),
    [
        ((), {"surprise": 1}, "config field surprise=1 is unknown"),
        (("llm_config", "lora_config"), {"use_dora": True}, "lora_config.use_dora=True is unknown"),
        (("llm_config", "lora_config"), {"use_rslora": True}, "lora_config.use_rslora=True is unknown"),
        (("llm_config", "lora_config"), {"r": 0}, "r: 0 is not a positive integer"),
        (("llm_config", "lora_config"), {"lora_alpha": "32"}, "lora_alpha: '32' is not a number"),
        (("llm_config",), {"llm_model": None}, "llm_config.llm_model"),
        (("llm_config",), {"llm_model": "../judge"}, "no folder inside"),
        (("graph_encoder_config",), {"encoder_types": ["unimol"]}, r"encoder_types: \['unimol'\]"),
        (("graph_encoder_config", "unimol_config"), {"remove_hydrogen": True}, "remove_hydrogen=True"),
        (("blending_module_config",), {"num_heads": 5}, "5 heads do not divide"),
        (("blending_module_config",), {"num_layers": 1}, "num_layers: 1, the checkpoint has 2"),
        (("blending_module_config",), {"num_layers": 3}, r"cross_attn_blocks\.2\..* is missing"),
        (("qformer_config",), {"bert_name": "../bert"}, "bert_name: '../bert' is no folder inside"),
        (("qformer_config",), {"bert_name": "some/bert"}, "bert_name: 'some/bert' is no folder inside"),
        (("qformer_config",), {"num_query_tokens": 4}, "query_tokens has shape"),
        (("qformer_config",), 3, "qformer_config: an object is expected"),
    ],
)
def test_config_errors(folder, judge, place, fields, message):
    shutil.copytree(folder / "bert", folder.parent / "bert")
    if isinstance(fields, dict):
        edit(folder, *place, **fields)
    else:
        edit(folder, *place[:-1], **{place[-1]: fields})
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_ignored_fields(folder):
    edit(folder, "llm_config", surprise=1)
    load(folder, ignore=["surprise"])


@pytest.mark.parametrize(
    "fields", [{"hidden_act": "relu"}, {"layer_norm_eps": "x"}, {"num_attention_heads": 7}]
)
def test_bert_errors(folder, fields):
    edit(folder / "bert", **fields)
    with pytest.raises(UnsupportedCheckpointError):
        open_model(folder)


def test_the_example_checkpoint():
    """What `examples/make_tiny_mol.py` writes has the names and shapes of the reference's own."""
    published = load_file(REDUCED / "checkpoint" / "model.safetensors")
    script = Path(__file__).parents[2] / "examples" / "make_tiny_mol.py"
    ours = runpy.run_path(str(script))["shapes"]()
    assert not set(ours) - set(published)
    for name, tensor in published.items():
        if name.startswith(LLM) and name.endswith(
            ("embed_tokens.weight", "lm_head.weight")
        ):  # more tokens there
            assert ours[name][1:] == tensor.shape[1:]
        elif tensor.is_floating_point() and "graph_pred_linear" not in name:  # which is not used
            assert ours[name] == tuple(tensor.shape), name


def test_published_bert(tmp_path):
    """A config that leaves out what the reference takes for granted."""
    config = {"architectures": ["MolLLaMA"], "llm_config": {"llm_model": "meta-llama/Llama-3.1-8B-Instruct"}}
    found = read_mol_llama_config(config, tmp_path)
    assert found is not None
    assert (found.lora_rank, found.lora_alpha, found.blending_layers, found.blending_heads) == (8, 32, 4, 8)
    assert found.qformer == QFormerConfig(8, 2, 12, 768, 12, 3072, 1e-12)
    assert read_mol_llama_config({"architectures": ["LlamaForCausalLM"]}, tmp_path) is None


def test_folders_inside_only(folder):
    (folder / "link").symlink_to(folder.parent)
    assert folder_inside(folder, "bert") == (folder / "bert").resolve()
    for name in ("..", "../mol", "", ".", "link", "/etc", str(folder.parent), "bert/config.json", "nothing"):
        assert folder_inside(folder, name) is None, name


def test_plain_config_is_refused():
    with pytest.raises(UnsupportedCheckpointError, match="open_model"):
        model_config(open_checkpoint(REDUCED / "checkpoint").config)
