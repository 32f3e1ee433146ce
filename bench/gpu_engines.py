"""A random model of the 7B's shape, and whole engines timed on it: ours and vLLM."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from bench.engines import MissingError, prompt, short_prompts
from bench.pairs import RUBRIC, make_pairs, seconds_to_judge
from bench.vision_models import write_tokenizer

VOCAB, HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM = 152064, 3584, 18944, 28, 4, 128
BATCHES, PROMPTS, STEPS = (1, 8, 64), (512, 2048), 128
PAIRS, VOTES, THINK = 32, 4, 128


def random_model(folder: Path, layers: int) -> Path:
    """Qwen2's layout with random bfloat16 weights, a shard a layer, written once."""
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True)
    write_tokenizer(folder)
    generator = torch.Generator("cuda").manual_seed(0)

    def random(*size: int) -> torch.Tensor:
        scale = size[-1] ** -0.5 if len(size) > 1 else 0.02
        return (torch.randn(size, generator=generator, device="cuda") * scale).bfloat16().cpu()

    weight_map: dict[str, str] = {}

    def save(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / name, {"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))

    ones = torch.ones(HIDDEN, dtype=torch.bfloat16)
    table = {"model.embed_tokens.weight": random(VOCAB, HIDDEN), "lm_head.weight": random(VOCAB, HIDDEN)}
    save("tables.safetensors", {**table, "model.norm.weight": ones})
    kv = KV_HEADS * HEAD_DIM
    for i in range(layers):
        attention, mlp = f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp."
        tensors = {
            f"{attention}{n}_proj.weight": random(s, HIDDEN)
            for n, s in zip("qkv", (HIDDEN, kv, kv), strict=True)
        }
        tensors |= {
            f"{attention}{n}_proj.bias": random(s) for n, s in zip("qkv", (HIDDEN, kv, kv), strict=True)
        }
        tensors[f"{attention}o_proj.weight"] = random(HIDDEN, HIDDEN)
        tensors |= {f"{mlp}{n}_proj.weight": random(INNER, HIDDEN) for n in ("gate", "up")}
        tensors[f"{mlp}down_proj.weight"] = random(HIDDEN, INNER)
        norms = ("input_layernorm", "post_attention_layernorm")
        tensors |= {f"model.layers.{i}.{n}.weight": ones.clone() for n in norms}
        save(f"layer-{i:02}.safetensors", tensors)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(_config(layers)))
    return folder


def measure_engine(folder: Path) -> dict[str, float]:
    """Tokens a second: prompts of each length, and decode steps of each batch."""
    from flexjudge_fast import Engine, SamplingParams

    with Engine.from_pretrained(folder, device="cuda", max_model_len=8192, prefix_caching=False) as engine:

        def generate(prompts: list[list[int]], num_tokens: int) -> float:
            params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
            start = time.perf_counter()
            engine.generate(prompts, params)
            return time.perf_counter() - start

        return _speeds(generate)


def measure_judging(folder: Path, num_seqs: int = 64) -> dict[str, float]:
    """Pairs a second, `num_seqs` sequences at once: both orders, four votes, one rubric that is new.

    Under another rubric they are judged before, so that kernels are compiled and graphs recorded.
    """
    from flexjudge_fast import Engine, Judgement

    with Engine.from_pretrained(folder, device="cuda", max_model_len=8192, max_num_seqs=num_seqs) as engine:
        for rubric in ("Be fair.", RUBRIC):
            asked = {"rubric": rubric, "votes": VOTES, "order": "both", "max_think_tokens": THINK}
            items = [Judgement("pair", q, answers, **asked) for q, answers in make_pairs(PAIRS)]
            seconds = seconds_to_judge(engine, items)
        return {f"the judge's work, {num_seqs} at once, pairs/s": PAIRS / seconds}


class Vllm:
    """vLLM on the same folder, through its offline API."""

    def __init__(self, folder: Path) -> None:
        try:
            import vllm
        except ImportError as error:
            raise MissingError("vllm is not installed") from error
        self._vllm: Any = vllm
        self._llm = vllm.LLM(str(folder), max_model_len=8192, enable_prefix_caching=False)

    def measure(self) -> dict[str, float]:
        """As `measure_engine`."""

        def generate(prompts: list[list[int]], num_tokens: int) -> float:
            params = self._vllm.SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
            start = time.perf_counter()
            self._llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
            return time.perf_counter() - start

        return _speeds(generate)


def _speeds(generate: Any) -> dict[str, float]:
    found = {}
    for length in PROMPTS:
        generate([prompt(length)], 1)
        found[f"prefill {length}, tok/s"] = length / min(generate([prompt(length)], 1) for _ in range(3))
    for batch in BATCHES:
        prompts = short_prompts(batch)
        generate(prompts, STEPS)
        once = min(generate(prompts, 1) for _ in range(3))
        steps = min(generate(prompts, STEPS + 1) for _ in range(3)) - once
        found[f"decode batch {batch}, tok/s"] = batch * STEPS / steps
    return found


def _config(layers: int) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
        "vocab_size": VOCAB,
        "torch_dtype": "bfloat16",
        "eos_token_id": 257,
    }
