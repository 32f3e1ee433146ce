"""Turns sampling parameters into draws, and reads log-probabilities off a row of logits."""

from collections.abc import Sequence

import torch

from flexjudge_fast.engine.sampling_params import SamplingParams
from flexjudge_fast.ops.sample import Draw, sample_reference


def draw_of(params: SamplingParams, row: int, uniform: float) -> Draw:
    """The draw that `params` ask for. uniform: in [0, 1); unused when greedy."""
    return Draw(row, params.top_k, params.temperature, params.top_p, params.min_p, uniform)


def sample_among(logits: torch.Tensor, draw: Draw, allowed: Sequence[int]) -> int:
    """Pick one of a few ids. logits: [num_rows, vocab_size]."""
    values = logits[draw.row, torch.as_tensor(allowed, device=logits.device)]
    return allowed[sample_reference(values.cpu(), draw)]  # a few numbers: the host is the faster


def log_probs(logits: torch.Tensor, ids: Sequence[int]) -> list[float]:
    """Log-probabilities of `ids` under the model alone: temperature 1, no mask. logits: [vocab_size]."""
    values: list[float] = (logits[torch.as_tensor(ids, device=logits.device)] - logits.logsumexp(-1)).tolist()
    return values


def top_log_probs(logits: torch.Tensor, token_id: int, count: int) -> dict[int, float]:
    """The `count` likeliest ids and `token_id`, with log-probabilities. logits: [vocab_size]."""
    ids = torch.topk(logits, count).indices.tolist() if count else []
    if token_id not in ids:
        ids.append(token_id)
    return dict(zip(ids, log_probs(logits, ids), strict=True))
