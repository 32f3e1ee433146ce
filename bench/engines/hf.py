"""`transformers` in bfloat16, on the weights that our loader reads, dequantised."""

import time
from pathlib import Path
from typing import Any

import psutil
import torch

from bench.engines import MissingError, prompt, short_prompts
from flexjudge_fast.weights.checkpoint import open_checkpoint


class Transformers:
    name = "transformers bf16"

    def __init__(self, model: Path, threads: int) -> None:
        torch.set_num_threads(threads)
        self._model = _load(model)

    @torch.inference_mode()
    def prefill(self, num_tokens: int) -> float:
        start = time.perf_counter()
        self._step(torch.tensor([prompt(num_tokens)]), None)
        return time.perf_counter() - start

    @torch.inference_mode()
    def decode(self, batch: int, num_tokens: int) -> float:
        tokens, cache = self._step(torch.tensor(short_prompts(batch)), None)
        start = time.perf_counter()
        for _ in range(num_tokens):
            tokens, cache = self._step(tokens, cache)
        return time.perf_counter() - start

    def close(self) -> None:
        self._model = None

    def _step(self, tokens: torch.Tensor, cache: Any) -> tuple[torch.Tensor, Any]:
        """The likeliest next tokens [batch, 1], and the cache."""
        out = self._model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values


def _load(path: Path) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingError("transformers is not installed (pip install transformers)") from error
    checkpoint = open_checkpoint(path)
    tensors = {name: checkpoint.tensor(name) for name in checkpoint.tensor_names()}
    needed = sum(2 * tensor.shape[0] * tensor.shape[-1] for tensor in tensors.values())
    if needed > psutil.virtual_memory().available // 2:
        raise MissingError(f"its bf16 weights take {needed / 1e9:.0f} GB, more than half of the free memory")
    fields = {k: v for k, v in checkpoint.config.items() if v is not None and k != "architectures"}
    config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    state = {name: tensor.to_dense(torch.bfloat16) for name, tensor in tensors.items()}
    state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    model.load_state_dict(state, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers are not in the checkpoint
    return model.eval()
