"""What quantising at load costs: KL divergence of SmolLM2's distributions from its bfloat16 weights."""

import json

import pytest
import torch
from safetensors.torch import save_file

from flexjudge_fast import Engine
from flexjudge_fast.weights.checkpoint import open_checkpoint

TEXT = """
A judge reads a question and several answers, and says which of them is better. The first answer may
be longer, the second one more to the point; neither length nor confidence makes a statement true.
Water boils at 100 degrees Celsius at sea level, and at a lower temperature on a mountain. In 1969
two people walked on the Moon for the first time. The French revolution began in 1789, and Napoleon
became emperor in 1804. A triangle with sides of 3, 4 and 5 has a right angle, because 9 + 16 = 25.

def mean(values):
    if not values:
        raise ValueError("no values")
    return sum(values) / len(values)

Dear colleagues, please find attached the minutes of our last meeting. We agreed to measure first
and to change the code afterwards. Die Katze sitzt auf der Matte und schaut aus dem Fenster. Once
upon a time there was a small dragon who was afraid of fire. He lived with his grandmother in a cave
above the village, and each morning he went down to the river to drink. One day he met a fisherman
who had lost his way.
"""


@pytest.fixture(scope="module")
def dense(smollm2_path, tmp_path_factory):
    """SmolLM2 as a bfloat16 folder: what its Q4_1 file holds (the original weights are not to be had)."""
    folder = tmp_path_factory.mktemp("smollm2")
    checkpoint = open_checkpoint(smollm2_path)
    tensors = {name: checkpoint.tensor(name).to_dense(torch.bfloat16) for name in checkpoint.tensor_names()}
    save_file(tensors, folder / "model.safetensors")
    for name, data in (("config", checkpoint.config), ("tokenizer_config", checkpoint.tokenizer_config)):
        (folder / f"{name}.json").write_text(json.dumps(data, default=lambda number: number.item()))
    (folder / "tokenizer.json").write_text(checkpoint.tokenizer_json())
    return folder


def distributions(folder, quantization):
    """Log-probabilities after every token of TEXT: [num_tokens, vocab_size]."""
    engine = Engine.from_pretrained(
        folder, max_model_len=512, kv_cache_memory="256MiB", dtype="bfloat16", quantization=quantization
    )
    try:
        return engine.logits(TEXT).log_softmax(-1)
    finally:
        engine.close()


@pytest.mark.slow
def test_kl_of_each_quantisation(dense):
    """The gates: 0.001 a token for int8, 0.02 for int4 (in groups of 32, as the weights themselves are)."""
    reference = distributions(dense, None)
    for name, limit in (("int8", 0.001), ("int4", 0.02)):
        got = distributions(dense, name)
        kl = (reference.exp() * (reference - got)).sum(-1)
        print(f"{name}: KL {kl.mean():.5f} a token, at most {kl.max():.4f}")
        assert 0 < kl.mean() <= limit
