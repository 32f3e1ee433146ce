"""Draws one token from a row of logits, and reads log-probabilities off it."""

from collections.abc import Sequence

import torch

from flexjudge_fast.engine.sampling_params import SamplingParams

_NUCLEUS_GUESS = 256  # a nucleus is nearly always inside the likeliest 256 tokens; else all are sorted


def sample_token(
    logits: torch.Tensor,
    params: SamplingParams,
    draw: float,
    allowed: Sequence[int] | None = None,
    banned: Sequence[int] = (),
) -> int:
    """Pick a token id.

    Args:
        logits: [vocab_size] float32.
        draw: uniform in [0, 1); unused when greedy.
        allowed: the only ids to choose from; all when `None`.
        banned: ids never chosen; read only when `allowed` is `None`.
    """
    if allowed is not None:
        choices = torch.as_tensor(allowed, device=logits.device)
        return int(choices[_sample(logits[choices], params, draw)])
    if len(banned):
        logits = logits.clone()
        logits[torch.as_tensor(banned, device=logits.device)] = -torch.inf
    return _sample(logits, params, draw)


def _sample(logits: torch.Tensor, params: SamplingParams, draw: float) -> int:
    if params.temperature == 0 or logits.numel() == 1:
        return int(logits.argmax())
    probs = torch.softmax(logits.double() / params.temperature, dim=-1)
    probs, ids = _truncate(probs, params)
    cumulative = probs.cumsum(0)
    index = int(torch.searchsorted(cumulative, draw * float(cumulative[-1]), right=True))
    return int(ids[min(index, len(ids) - 1)])


def _truncate(probs: torch.Tensor, params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor]:
    """top-k, then top-p over what is left, then min-p; returns probabilities and ids, likeliest first."""
    size = probs.numel()
    wanted = min(params.top_k or size, size)
    if params.top_p < 1 and wanted > _NUCLEUS_GUESS:
        top, ids = torch.topk(probs, _NUCLEUS_GUESS)
        mass = probs.sum() if wanted == size else torch.topk(probs, wanted).values.sum()
        if float(top.sum()) < params.top_p * float(mass):
            top, ids = torch.topk(probs, wanted)
    else:
        top, ids = torch.topk(probs, wanted)
        mass = top.sum()
    if params.top_p < 1:
        before = top.cumsum(0) - top  # probability of everything likelier
        keep = before < params.top_p * mass
        top, ids = top[keep], ids[keep]
    if params.min_p > 0:
        keep = top >= params.min_p * top[0]
        top, ids = top[keep], ids[keep]
    return top, ids


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
