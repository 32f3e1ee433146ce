"""Real GGUF weights against transformers on the same dequantised weights, and the judge's judgement."""

import pytest
import torch

from flexjudge_fast import Engine, Judge, Judgement, SamplingParams

TEXTS = (
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Die Katze sitzt auf",
    "1, 1, 2, 3, 5, 8,",
    "Once upon a time there was a small dragon who",
    "Q: Why is the sky blue?\nA:",
    "The three laws of thermodynamics are",
    "To make bread you need flour, water,",
    "import numpy as np\n\nx = np.",
    "El perro corre por",
    "In 1969, Neil Armstrong",
    "A list of fruits:\n- apple\n- ",
    "Dear Sir or Madam,\n\n",
    "SELECT name FROM users WHERE",
    "The mitochondria is",
    "こんにちは、",
    "Water boils at",
    "My favourite colour is",
    "<html>\n<head>",
    "If it rains tomorrow, then",
)


def reference_model(engine: Engine):
    """transformers' model, filled with the weights that our loader reads, dequantised."""
    import transformers

    from flexjudge_fast.weights.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(engine.provenance["model"])
    fields = {k: v for k, v in checkpoint.config.items() if v is not None and k != "architectures"}
    kind = fields.pop("model_type")
    config = transformers.AutoConfig.for_model(kind, **fields)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    state = {name: checkpoint.tensor(name).to_dense(torch.float32) for name in checkpoint.tensor_names()}
    state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    model.load_state_dict(state, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval()


def check_greedy(path, quantization, margin_limit, count=64):
    """Batched, cached, paged: the same tokens; a first difference only where two logits are nearly level."""
    engine = Engine.from_pretrained(
        path, max_model_len=512, kv_cache_memory="1GiB", quantization=quantization
    )
    params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
    completions = engine.generate(list(TEXTS), params)
    model = reference_model(engine)
    same = 0
    for completion in completions:
        ids = torch.tensor([completion.prompt_token_ids + completion.token_ids])
        start = len(completion.prompt_token_ids) - 1
        with torch.inference_mode():
            logits = model(ids).logits[0, start:-1]
        # Up to the first difference both have read the same tokens, so one pass over ours checks them all.
        for i, token in enumerate(completion.token_ids):
            best = int(logits[i].argmax())
            if best != token:
                margin = float(logits[i, best] - logits[i, token])
                print(f"first difference at token {i}, logit margin {margin:.2e}")
                assert margin < margin_limit
                break
            same += 1
    print(f"{same} of {count * len(completions)} tokens stand before a first difference")
    assert same >= 0.95 * count * len(completions)


@pytest.mark.slow
@pytest.mark.parametrize(("quantization", "margin_limit"), [("dequantize", 1e-4), (None, 2e-2)])
def test_smollm2_greedy(smollm2_path, quantization, margin_limit):
    check_greedy(smollm2_path, quantization, margin_limit)


@pytest.mark.slow
@pytest.mark.parametrize(("quantization", "margin_limit"), [("dequantize", 1e-4), (None, 2e-2)])
def test_qwen05b_greedy(qwen05b_path, quantization, margin_limit):
    check_greedy(qwen05b_path, quantization, margin_limit)


def test_quantised_weights_stay_quantised(smollm2_path):
    engine = Engine.from_pretrained(smollm2_path, max_model_len=512, kv_cache_memory="64MiB")
    expanded = Engine.from_pretrained(
        smollm2_path, max_model_len=512, kv_cache_memory="64MiB", quantization="dequantize"
    )
    packed, dense = (e._parts.runner.model.plan.model.layers[0].down.parts[0] for e in (engine, expanded))
    assert packed.data.nbytes * 6 < dense.data.nbytes
    prompt = "The capital of France is"
    assert (engine.logits(prompt) - expanded.logits(prompt)).abs().max() < 2e-2


TRIPLES = (
    ("What is 7 times 8?", "56", "54"),
    ("What is the capital of Italy?", "Rome", "Milan"),
    ("Which planet is closest to the sun?", "Mercury", "Neptune"),
    ("Translate 'thank you' into Spanish.", "Gracias", "Adiós"),
    ("What is the chemical formula of water?", "H2O", "CO2"),
    ("Who wrote Romeo and Juliet?", "William Shakespeare", "Albert Einstein"),
    ("How many legs does a spider have?", "Eight", "Three"),
    ("Is the number 17 prime?", "Yes, 17 is prime: only 1 and 17 divide it.", "No, 17 is 4 times 4."),
)


@pytest.mark.slow
def test_the_judge_judges(qwen15b_path):
    """Qwen2.5-1.5B prefers the right answer in at least 7 of 8 easy questions."""
    judge = Judge.from_pretrained(qwen15b_path, max_model_len=1024, kv_cache_memory="256MiB")
    judgements = [
        Judgement("score", question, (answer,), max_think_tokens=0, temperature=0)
        for question, *answers in TRIPLES
        for answer in answers
    ]
    expected = {verdict.index: verdict.expected_scores[0] for verdict in judge.run(judgements)}
    right = [expected[2 * i] > expected[2 * i + 1] for i in range(len(TRIPLES))]
    print([(round(expected[2 * i], 2), round(expected[2 * i + 1], 2)) for i in range(len(TRIPLES))])
    assert sum(right) >= 7
