"""The small fused kernels and the vision tower's attention: what a model launches, and the cost."""

from collections.abc import Callable, Iterator

import torch

from flexjudge_fast.kernels.catalog import EIGHT_BITS, Launch, ModelShape, random_tensor
from flexjudge_fast.kernels.embedding import embedding
from flexjudge_fast.kernels.rms_norm import add_rms_norm, add_rms_norm_quantized, rms_norm, rms_norm_quantized
from flexjudge_fast.kernels.rotary_kv import rotary_kv
from flexjudge_fast.kernels.sample import sample
from flexjudge_fast.kernels.segment_attention import segment_attention
from flexjudge_fast.kernels.swiglu import swiglu, swiglu_quantized
from flexjudge_fast.ops.kv_cache import kv_row_size
from flexjudge_fast.ops.rotary_kv import RotaryAngles
from flexjudge_fast.ops.segment_attention import Segments

TOKENS = (1, 16, 512)
PATCHES, WINDOW, FRAME = 4096, 64, 1024


def launches(shape: ModelShape, device: str = "meta") -> Iterator[Launch]:
    """Norms, rotary and cache writes, activations and embeddings of a decoder's step; vision tower's layers.

    device: "meta" to compile; "cuda" for tensors that can be run.
    """
    for tokens in TOKENS:
        yield from _norms(shape, shape.hidden, tokens, device, shape.weights in EIGHT_BITS)
        for has_media in (False, True):
            yield _embedding(shape, tokens, has_media, device)
        yield _swiglu(shape, shape.intermediate, tokens, device, shape.weights)
        for sections in ((), _sections(shape)):
            yield _rotary(shape, tokens, sections, device)
        yield _sampling(shape, tokens, device)
    if shape.vision_hidden:
        yield from _norms(shape, shape.vision_hidden, PATCHES, device, False)
        yield _swiglu(shape, shape.vision_intermediate, PATCHES, device, "")
        for name, size in (("windows", WINDOW), ("frames", FRAME)):
            yield _vision_attention(shape, name, size, device)


def _norms(shape: ModelShape, hidden: int, tokens: int, device: str, quantizes: bool) -> Iterator[Launch]:
    """One alone, which a step has once, and one behind the residual addition."""
    x, residual = (random_tensor(tokens, hidden, dtype=shape.dtype, device=device) for _ in range(2))
    weight = random_tensor(hidden, dtype=shape.dtype, device=device)
    runs: dict[str, tuple[int, Callable[[], object]]] = {}  # activations moved, call
    out, case = x.nbytes, ""
    if quantizes:
        dtype, case = EIGHT_BITS[shape.weights], f", {shape.weights}"
        out = x.numel() + 4 * tokens
        runs["norm"] = (x.nbytes + out, lambda: rms_norm_quantized(x, weight, 1e-6, dtype))
        runs["add, norm"] = (
            3 * x.nbytes + out,
            lambda: add_rms_norm_quantized(x, residual, weight, 1e-6, dtype),
        )
    else:
        runs["norm"] = (x.nbytes + out, lambda: rms_norm(x, weight, 1e-6))
        runs["add, norm"] = (3 * x.nbytes + out, lambda: add_rms_norm(x, residual, weight, 1e-6))
    for name, (num_bytes, run) in runs.items():
        yield _launch(
            "rms_norm", f"{name} {hidden}{case}", run, tokens, num_bytes + weight.nbytes, 6.0 * x.numel()
        )


def _sampling(shape: ModelShape, rows: int, device: str) -> Launch:
    """A draw with top-p from each row of peaked logits. Beyond them, summaries are written and read."""
    logits = random_tensor(rows, shape.vocab, dtype=torch.float32, device=device)
    if device != "meta":
        logits *= 4 / logits.std()
    integers = torch.zeros(rows, 3, dtype=torch.int32, device=device)
    integers[:, 0], integers[:, 2] = torch.arange(rows, device=device), -1
    floats = torch.full((rows, 4), 0.5, device=device)
    floats[:, 2] = 0
    masks = torch.zeros(1, -(-shape.vocab // 32), dtype=torch.int32, device=device)
    num_bytes = logits.nbytes + integers.nbytes + floats.nbytes + 8 * rows
    moved = num_bytes + 2 * 2 * 4 * masks.numel() * rows
    run = lambda: _discard(sample(logits, integers, floats, masks))  # noqa: E731
    return Launch("sample", f"{rows} rows", run, rows, num_bytes, moved, 0.0)


def _sections(shape: ModelShape) -> tuple[int, ...]:
    """Of the pairs, as Qwen2.5-VL has them: 16, 24 and 24 of 64."""
    half = shape.head_dim // 2
    return (half // 4, half * 3 // 8, half - half // 4 - half * 3 // 8)


def _rotary(shape: ModelShape, tokens: int, sections: tuple[int, ...], device: str) -> Launch:
    """Tokens go to slots spread over a cache, at positions up to its size."""
    half, num_blocks = shape.head_dim // 2, 2 * -(-tokens // shape.block_size)
    length = num_blocks * shape.block_size
    cos, sin = (random_tensor(length, half, dtype=torch.float32, device=device) for _ in range(2))
    rows = (3, tokens) if sections else (tokens,)
    positions = torch.arange(tokens, device=device).expand(rows).contiguous()
    slots = 2 * torch.arange(tokens, device=device)
    heads = shape.num_heads + 2 * shape.num_kv_heads
    qkv = random_tensor(tokens, heads, shape.head_dim, dtype=shape.dtype, device=device)
    row_size = kv_row_size(shape.head_dim, shape.kv_dtype)
    cache_shape = (2, num_blocks, shape.block_size, shape.num_kv_heads, row_size)
    cache = random_tensor(*cache_shape, dtype=shape.kv_dtype, device=device)
    angles = RotaryAngles(cos, sin, positions, sections, shape.dtype)
    stored = 2 * tokens * shape.num_kv_heads * row_size * shape.kv_dtype.itemsize
    queries = tokens * shape.num_heads * shape.head_dim * shape.dtype.itemsize
    num_bytes = qkv.nbytes + queries + stored + tokens * (8 * half + 16)
    case = f"{'M-RoPE' if sections else 'RoPE'}, KV {str(shape.kv_dtype).removeprefix('torch.')}"
    return _launch(
        "rotary_kv", case, lambda: rotary_kv(qkv, angles, cache, slots), tokens, num_bytes, 3.0 * qkv.numel()
    )


def _swiglu(shape: ModelShape, size: int, tokens: int, device: str, weights: str) -> Launch:
    gate_up = random_tensor(tokens, 2 * size, dtype=shape.dtype, device=device)
    flops = 6.0 * tokens * size
    if weights in EIGHT_BITS:
        dtype, num_bytes = EIGHT_BITS[weights], gate_up.nbytes + tokens * (size + 4)
        run = lambda: swiglu_quantized(gate_up, dtype)  # noqa: E731
        return _launch("swiglu", f"{size}, {weights}", run, tokens, num_bytes, flops)
    return _launch("swiglu", str(size), lambda: swiglu(gate_up), tokens, 1.5 * gate_up.nbytes, flops)


def _embedding(shape: ModelShape, tokens: int, has_media: bool, device: str) -> Launch:
    """With media, every other token is one."""
    table = random_tensor(shape.vocab, shape.hidden, dtype=shape.dtype, device=device)
    media = random_tensor(tokens, shape.hidden, dtype=shape.dtype, device=device) if has_media else None
    ids = torch.arange(tokens, device=device) * 7 % shape.vocab
    if has_media and device != "meta":
        ids[::2] = shape.vocab + torch.arange(0, tokens, 2, device=device)
    num_bytes = 2 * tokens * shape.hidden * shape.dtype.itemsize + ids.nbytes
    case = "media between" if has_media else "tokens"
    return _launch("embedding", case, lambda: embedding(ids, table, media), tokens, num_bytes, 0)


def _vision_attention(shape: ModelShape, name: str, size: int, device: str) -> Launch:
    """Moved: inputs and results once, as programs of a segment read its keys and values again out of the L2;
    frames' queries and keys are written, and read, once more."""
    heads, head_dim = shape.vision_heads, shape.vision_head_dim
    qkv = random_tensor(PATCHES, 3, heads, head_dim, dtype=shape.dtype, device=device)
    cos, sin = (random_tensor(PATCHES, head_dim // 2, dtype=torch.float32, device=device) for _ in range(2))
    segments = Segments(torch.arange(0, PATCHES + 1, size, device=device), size)
    num_bytes = qkv.nbytes * 4 / 3 + cos.nbytes + sin.nbytes
    return Launch(
        "segment_attention",
        f"{name} of {size}",
        lambda: _discard(segment_attention(qkv, segments, (cos, sin))),
        PATCHES,
        num_bytes,
        num_bytes + (0 if size == WINDOW else qkv.nbytes * 4 / 3),
        4.0 * PATCHES * size * heads * head_dim + 4.0 * qkv.numel(),
    )


def _launch(
    kernel: str, case: str, run: Callable[[], object], tokens: int, num_bytes: float, flops: float
) -> Launch:
    """These kernels move what they must, once."""
    return Launch(kernel, case, lambda: _discard(run()), tokens, num_bytes, num_bytes, flops)


def _discard(result: object) -> None:
    """A launch's `run` returns nothing."""
