"""A config.json with every field that transformers 4.50 knew means what the trimmed one does."""

import json

import pytest
import torch

from flexjudge_fast import Engine
from flexjudge_fast.errors import UnsupportedCheckpointError
from flexjudge_fast.models.audio_config import read_audio_config
from flexjudge_fast.models.config import model_config, read_decoder_config
from flexjudge_fast.models.vision_config import read_vision_config
from tests.models import write_checkpoint, write_omni_checkpoint, write_vision_checkpoint

# What `to_dict` of transformers 4.50 gave for `PretrainedConfig()`, but for the version.
GENERIC = {
    "_attn_implementation_autoset": True,
    "_name_or_path": "",
    "add_cross_attention": False,
    "architectures": None,
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "bos_token_id": None,
    "chunk_size_feed_forward": 0,
    "cross_attention_hidden_size": None,
    "decoder_start_token_id": None,
    "diversity_penalty": 0.0,
    "do_sample": False,
    "early_stopping": False,
    "encoder_no_repeat_ngram_size": 0,
    "eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "finetuning_task": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "is_decoder": False,
    "is_encoder_decoder": False,
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "length_penalty": 1.0,
    "max_length": 20,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_scores": False,
    "pad_token_id": None,
    "prefix": None,
    "problem_type": None,
    "pruned_heads": {},
    "remove_invalid_values": False,
    "repetition_penalty": 1.0,
    "return_dict": True,
    "return_dict_in_generate": False,
    "sep_token_id": None,
    "suppress_tokens": None,
    "task_specific_params": None,
    "temperature": 1.0,
    "tf_legacy_loss": False,
    "tie_encoder_decoder": False,
    "tie_word_embeddings": True,
    "tokenizer_class": None,
    "top_k": 50,
    "top_p": 1.0,
    "torch_dtype": None,
    "torchscript": False,
    "typical_p": 1.0,
    "use_bfloat16": False,
}
VISION = {
    "embed_dim": 48,
    "in_chans": 3,
    "spatial_patch_size": 14,
    "init_std": 0.02,
}  # Omni's, beside the sizes
THINKER = {"ignore_index": -100, "init_std": 0.02, "user_token_id": 872, "vision_token_id": 261}


def dump(config):
    """Generic fields in every part; none of the part's own is changed."""
    inner = {name: dump(value) for name, value in config.items() if name.endswith("_config")}
    return {**GENERIC, **config, **inner}


def dump_omni(config):
    full = dump(config)
    # As transformers wrote it: no value of the Thinker's own, so the default, which its text part overrules.
    full["thinker_config"] |= {**THINKER, "tie_word_embeddings": True}
    full["thinker_config"]["vision_config"] |= VISION
    return full


def flat(config):
    """A Qwen2.5-VL as before transformers 4.52: the text's fields at the top."""
    return {**config.pop("text_config"), **config}


WRITERS = {
    "omni": (lambda folder: write_omni_checkpoint(folder, whole=True), lambda config: config),
    "thinker": (write_omni_checkpoint, lambda config: config),
    "vision": (write_vision_checkpoint, lambda config: config),
    "flat vision": (write_vision_checkpoint, flat),
    "qwen2": (lambda folder: write_checkpoint(folder, "qwen2"), lambda config: config),
    "llama": (write_checkpoint, lambda config: config),
}


@pytest.fixture(scope="module")
def omni(tmp_path_factory):
    folder = tmp_path_factory.mktemp("omni")
    write_omni_checkpoint(folder, whole=True)
    return folder


def read(config):
    run = model_config(config)
    return read_decoder_config(run), read_vision_config(run), read_audio_config(run)


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_dump_means_the_trimmed_one(tmp_path, name):
    write, change = WRITERS[name]
    write(tmp_path)
    config = change(json.loads((tmp_path / "config.json").read_text()))
    assert read(dump(config)) == read(config)


def test_a_full_dump_of_an_omni_gives_the_same_logits(omni, tmp_path):
    """The Thinker's part says "tied" there; the head that is stored is the one that is used."""
    for path in omni.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((omni / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(dump_omni(config)))
    found = []
    for folder in (omni, tmp_path):
        with Engine.from_pretrained(folder, kv_cache_memory="32MiB") as engine:
            found.append(engine.logits("a prompt"))
    assert torch.equal(*found)


@pytest.mark.parametrize("part", ["", "text_config", "vision_config", "audio_config"])
@pytest.mark.parametrize(("field", "value"), [("surprise", 1), ("zero", 0), ("pruned_heads", {"0": [1]})])
def test_what_may_change_the_maths_is_refused_by_name(omni, part, field, value):
    full = dump_omni(json.loads((omni / "config.json").read_text()))
    thinker = full["thinker_config"]
    (thinker[part] if part else thinker)[field] = value
    with pytest.raises(UnsupportedCheckpointError, match=rf"config field (\w+\.)?{field}(=| is|: )"):
        read(full)


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("vision_config", "embed_dim", 49),
        ("vision_config", "in_chans", 1),
        ("vision_config", "hidden_act", "gelu"),
        ("audio_config", "activation_function", "relu"),
        ("audio_config", "scale_embedding", True),
    ],
)
def test_maths_that_is_built_in(omni, part, field, value):
    full = dump_omni(json.loads((omni / "config.json").read_text()))
    full["thinker_config"][part][field] = value
    with pytest.raises(UnsupportedCheckpointError, match=rf"config field {part}\.{field}: .*, only "):
        read(full)
