"""Mol-LLaMA: stages, logits and greedy tokens of the reference code, its base its own or a judge's."""

import contextlib
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from flexjudge_fast.layers.attention import AttentionInput
from flexjudge_fast.models.config import model_config, read_decoder_config
from flexjudge_fast.models.registry import load_model, load_molecule, open_model
from flexjudge_fast.ops.backend import has_compiled_ops
from flexjudge_fast.weights.quantization import find_quantization
from tests.golden_molecules import SETS, golden, golden_folder

STAGE_TOLERANCE, LOGIT_TOLERANCE = 2e-5, 1e-4
CLOSE = 1e-3  # two logits this close may change places
CPU = torch.device("cpu")
BACKENDS = ("compiled", "reference")


@contextlib.contextmanager
def backend(name, monkeypatch):
    if name == "reference":
        monkeypatch.setenv("FLEXJUDGE_BACKEND", "reference")
    elif not has_compiled_ops():
        pytest.skip("the compiled ops are not built here")
    yield
    monkeypatch.undo()


@pytest.fixture(params=SETS)
def gold(request):
    golden_folder(request.param)
    return golden(request.param)


def load_all(checkpoint, num_threads=1, **options):
    config = read_decoder_config(model_config(checkpoint.config))
    model = load_model(checkpoint, config, torch.float32, CPU, 512, num_threads=num_threads, **options)
    return model, load_molecule(checkpoint, config, CPU, num_threads)


class Runner:
    """Runs prompts side by side with `step`, each in a block of its own."""

    def __init__(self, model, count=1, length=256):
        config = model.config
        self.model, self.length, self.lens = model, length, [0] * count
        shape = (config.num_layers, 2, count, length, config.num_kv_heads, config.head_dim)
        self.cache = torch.zeros(shape)

    @torch.inference_mode()
    def logits(self, parts, media=None):
        """parts: the next ids of each prompt. Returns the logits of all of them, one tensor each."""
        sizes = [len(part) for part in parts]
        places = [torch.arange(n, n + size) for n, size in zip(self.lens, sizes, strict=True)]
        self.lens = [n + size for n, size in zip(self.lens, sizes, strict=True)]
        inputs = AttentionInput(
            torch.cat(places),
            torch.cat([i * self.length + place for i, place in enumerate(places)]),
            torch.arange(len(parts))[:, None],
            torch.tensor([0, *sizes]).cumsum(0),
            torch.tensor(self.lens),
            max(self.lens),
            media,
        )
        ids = torch.cat([torch.as_tensor(part) for part in parts])
        logits, finite = self.model.step(ids, inputs, self.cache, torch.arange(len(ids)))
        assert finite.all()
        return logits.split(sizes)


def with_media(checkpoint, ids, flags):
    """Prompts whose `<mol>` are rows of the media, in order."""
    at, out = checkpoint.vocab_size, []
    for one, flag in zip(ids, flags, strict=True):
        one = one.clone()
        assert (one[flag] == checkpoint.mol_token_id).all()
        one[flag] = torch.arange(at, at + int(flag.sum()))
        at += int(flag.sum())
        out.append(one)
    return out


def greedy(runner, parts, media, masked=(), count=16):
    """The prompts' logits, `count` greedy tokens of each, and the logits at each of them.

    The reference masks nothing: of one molecule it generates a `<mol>`.
    """
    prompt = runner.logits(parts, media)
    steps, tokens = [torch.stack([one[-1] for one in prompt])], []
    for _ in range(count):
        allowed = steps[-1].clone()
        allowed[:, list(masked)] = -torch.inf
        tokens.append(allowed.argmax(-1))
        steps.append(torch.cat(runner.logits([[token] for token in tokens[-1]])))
    return prompt, torch.stack(tokens, 1), torch.stack(steps[:-1], 1)


@pytest.mark.parametrize("name", BACKENDS)
def test_stages(gold, name, monkeypatch):
    with backend(name, monkeypatch):
        _, encoder = load_all(open_model(gold.folder / "checkpoint"))
        for molecule in gold.names:
            graph = gold.graph(molecule)
            with torch.inference_mode():
                found = encoder.stages([graph])
            kept = gold.tensor(f"{molecule}/blended_mask")[0].bool()
            wanted = {
                "space": gold.tensor(f"{molecule}/unimol_rep")[0, : len(graph.tokens)],
                "graph": gold.tensor(f"{molecule}/moleculestm_rep")[0],
                "normed_space": gold.tensor(f"{molecule}/unimol_ln")[0, : len(graph.tokens)],
                "normed_graph": gold.tensor(f"{molecule}/moleculestm_ln")[0],
                "blended": gold.tensor(f"{molecule}/blended")[0][kept],
                "queries": gold.tensor(f"{molecule}/qformer_out")[0],
                "embeddings": gold.tensor(f"{molecule}/llm_proj")[0],
            }
            for stage, value in wanted.items():
                difference = (getattr(found, stage) - value).abs().max()
                assert difference < STAGE_TOLERANCE, (molecule, stage)


@pytest.mark.parametrize("name", BACKENDS)
def test_same_bits_in_any_company(gold, name, monkeypatch):
    with backend(name, monkeypatch):
        checkpoint = open_model(gold.folder / "checkpoint")
        graphs = [gold.graph(molecule) for molecule in gold.names]
        _, encoder = load_all(checkpoint)
        alone = torch.stack([encoder.encode([graph]) for graph in graphs])
        assert (alone[: len(gold.cases["cases"])] - gold.tensor("batch6/llm_proj")).abs().max() < 2e-5
        for threads in (1, 2, 3):
            _, other = load_all(checkpoint, threads)
            for order in (range(9), (8, 3, 0, 5, 5, 2), (7, 6), (5,) * 20):
                together = other.encode([graphs[i] for i in order]).unflatten(0, (-1, 8))
                assert torch.equal(together, alone[list(order)])


@pytest.mark.parametrize("name", BACKENDS)
def test_logits_and_greedy(gold, name, monkeypatch):
    """Of each molecule's prompt alone."""
    with backend(name, monkeypatch):
        checkpoint = open_model(gold.folder / "checkpoint")
        model, encoder = load_all(checkpoint)
        assert checkpoint.masked_token_ids == (589,)
        for molecule in gold.names:
            flags = gold.tensor(f"{molecule}/mol_token_flag").bool()
            parts = with_media(checkpoint, gold.tensor(f"{molecule}/input_ids"), flags)
            media = encoder.encode([gold.graph(molecule)])
            (logits,), tokens, _ = greedy(Runner(model), parts, media)
            assert (logits[-1] - gold.tensor(f"{molecule}/logits_last")[0]).abs().max() < LOGIT_TOLERANCE
            if f"{molecule}/logits" in gold.tensors:
                wanted = gold.tensor(f"{molecule}/logits")[0]
                assert (logits - wanted).abs().max() < LOGIT_TOLERANCE
            assert torch.equal(tokens, gold.tensor(f"{molecule}/greedy_ids")), molecule


@pytest.mark.parametrize("name", BACKENDS)
def test_batch_and_two_molecules(gold, name, monkeypatch):
    """The reference pads prompts on the left and molecules on the right; here nothing is padded."""
    with backend(name, monkeypatch):
        checkpoint = open_model(gold.folder / "checkpoint")
        model, encoder = load_all(checkpoint)
        cases = {
            "batch6": gold.cases["batch6"]["order"],
            "two_mols_multi_turn": gold.cases["two_mols_multi_turn"]["molecules"],
        }
        for case, molecules in cases.items():
            ids, flags = gold.tensor(f"{case}/input_ids"), gold.tensor(f"{case}/mol_token_flag").bool()
            kept = gold.tensors.get(f"{case}/attention_mask", torch.ones_like(ids)).bool()
            rows = [(one[keep], flag[keep]) for one, flag, keep in zip(ids, flags, kept, strict=True)]
            parts = with_media(checkpoint, *zip(*rows, strict=True))
            media = encoder.encode([gold.graph(molecule) for molecule in molecules])
            assert (
                media.view_as(gold.tensor(f"{case}/llm_proj")) - gold.tensor(f"{case}/llm_proj")
            ).abs().max() < 2e-5
            runner = Runner(model, len(parts))
            logits, tokens, _ = greedy(runner, parts, media)
            last = torch.stack([one[-1] for one in logits])
            assert (last - gold.tensor(f"{case}/logits_last")).abs().max() < LOGIT_TOLERANCE
            assert torch.equal(tokens, gold.tensor(f"{case}/greedy_ids")), case


def judge_folder(gold, variant, cases, tmp_path):
    """The judge as stored, or with two more ids."""
    stored = gold.folder / "judge_merge" / "judge_llm"
    if variant == "resized":
        return stored
    tensors = load_file(stored / "model.safetensors")
    for name, rows in (("model.embed_tokens", "embed"), ("lm_head", "lm_head")):
        more = cases[f"fullvocab/judge_extra_{rows}_rows"]
        tensors[f"{name}.weight"] = torch.cat((tensors[f"{name}.weight"], more))
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    config = (stored / "config.json").read_text().replace('"vocab_size": 588', '"vocab_size": 590')
    (tmp_path / "config.json").write_text(config)
    return tmp_path


@pytest.mark.parametrize("variant", ["resized", "fullvocab"])
@pytest.mark.parametrize("name", BACKENDS)
def test_judge_backbone(gold, name, variant, monkeypatch, tmp_path):
    cases = load_file(gold.folder / "judge_merge" / "judge_cases.safetensors")
    with backend(name, monkeypatch):
        judge = judge_folder(gold, variant, cases, tmp_path)
        checkpoint = open_model(gold.folder / "checkpoint", judge_backbone=judge)
        scored = {"resized": 588, "fullvocab": 590}[variant]
        assert checkpoint.masked_token_ids == ((588, 589) if variant == "resized" else (589,))
        model, encoder = load_all(checkpoint)
        keys = [
            key.removesuffix("/greedy_ids")
            for key in cases
            if key.startswith(variant) and "greedy_ids" in key
        ]
        assert len(keys) >= 6
        for key in keys:
            flags = cases[f"{key}/mol_token_flag"].bool()
            parts = with_media(checkpoint, cases[f"{key}/input_ids"], flags)
            media = encoder.encode([gold.graph(key.split("/")[1])])
            (logits,), tokens, steps = greedy(Runner(model), parts, media, checkpoint.masked_token_ids)
            wanted = cases[f"{key}/logits_last"][0, :scored]
            assert (logits[-1, :scored] - wanted).abs().max() < LOGIT_TOLERANCE, key
            check_greedy(key, tokens[0], cases[f"{key}/greedy_ids"][0], steps[0])


def check_greedy(key, tokens, wanted, steps):
    """Equal, or parted where two logits are closer than the reference's own rounding."""
    if torch.equal(tokens, wanted):
        return
    at = int((tokens != wanted).nonzero()[0])
    gap = float(steps[at, tokens[at]] - steps[at, wanted[at]])
    assert gap < CLOSE, (key, at, gap)
    warnings.warn(f"{key}: step {at} took the other of two logits that differ by {gap:.0e}", stacklevel=1)


@pytest.mark.parametrize("variant", ["resized", "fullvocab"])
def test_merged_tensors(variant, tmp_path):
    """Each of the reference's merged model, LoRA merged by us in float64."""
    gold = golden("full") if golden_folder("full") else None
    merge = gold.folder / "judge_merge"
    cases = load_file(merge / "judge_cases.safetensors")
    judge = judge_folder(gold, variant, cases, tmp_path)
    checkpoint = open_model(gold.folder / "checkpoint", judge_backbone=judge)
    merged = load_file(merge / f"merged_llm_{variant}.safetensors")
    seen = 0
    for stored, tensor in merged.items():
        name = stored.removeprefix("llm.base_model.model.")
        if ".lora_" in name:
            continue
        found = checkpoint.tensor(name.replace(".base_layer", "")).data
        if ".base_layer" in name:
            prefix = stored.removesuffix("base_layer.weight")
            up, down = (merged[f"{prefix}lora_{part}.default.weight"].double() for part in "BA")
            wanted = tensor.double() + 4 * (up @ down)
            assert (found - wanted).abs().max() < 1e-6 * wanted.abs().max(), name
        elif name == "lm_head.weight" and variant == "resized":
            assert torch.equal(found[:588], tensor[:588]) and not found[588:].any()
        else:
            assert torch.equal(found, tensor), name
        seen += 1
    assert seen == len([name for name in merged if ".lora_" not in name])
    names = set(checkpoint.tensor_names())
    assert {
        n.removeprefix("llm.base_model.model.").replace(".base_layer", "") for n in merged if "lora_" not in n
    } <= names


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_quantised_after_merging(quantization):
    """Layers are found under a Llama's names, so they are quantised as any other's."""
    if not has_compiled_ops():
        pytest.skip("the compiled ops are not built here")
    gold = golden("reduced")
    checkpoint = open_model(gold.folder / "checkpoint")
    exact, encoder = load_all(checkpoint)
    coarse, _ = load_all(checkpoint, quantization=find_quantization(quantization))
    flags = gold.tensor("ethanol/mol_token_flag").bool()
    parts = with_media(checkpoint, gold.tensor("ethanol/input_ids"), flags)
    media = encoder.encode([gold.graph("ethanol")])
    (one,), (two,) = (Runner(model).logits(parts, media) for model in (exact, coarse))
    assert 1e-4 < (one - two).abs().max() < 5
