"""The matrix products of a model's layers, and what they cost."""

from collections.abc import Callable, Iterator

import torch

from flexjudge_fast.kernels.catalog import EIGHT_BITS, Launch, ModelShape, random_tensor
from flexjudge_fast.kernels.linear import linear
from flexjudge_fast.kernels.linear_w4a16 import linear_w4a16
from flexjudge_fast.kernels.linear_w8a8 import linear_w8a8
from flexjudge_fast.kernels.quantize_tokens import quantize_tokens
from flexjudge_fast.kernels.runs import plan_runs, workspace_bytes

TOKENS = (1, 16, 64, 128, 512)


def launches(shape: ModelShape, device: str = "meta") -> Iterator[Launch]:
    """Products of one layer in the format `shape.weights`, and of the LM head, which is dense.

    Moved bytes: each weight, activation and output once, and workspaces twice. Programs that run at the same
    time read activations (and for more than 128 tokens, weights) again out of the L2; that is not counted.

    device: "meta" to compile; "cuda" for tensors that can be run, of noise.
    """
    matrices, dense = layer_matrices(shape), ModelShape(dtype=shape.dtype)
    for tokens in TOKENS:
        for name, (rows, columns, has_bias) in matrices.items():
            yield _product(shape, name, rows, columns, has_bias, tokens, device)
        yield _product(dense, "lm head", shape.vocab, shape.hidden, False, tokens, device)
        if shape.weights in EIGHT_BITS:
            for columns in sorted({columns for _, columns, _ in matrices.values()}):
                yield _quantisation(shape, columns, tokens, device)


def layer_matrices(shape: ModelShape) -> dict[str, tuple[int, int, bool]]:
    """By name: rows, columns, and whether there is a bias."""
    qkv = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    return {
        "qkv": (qkv, shape.hidden, True),
        "o": (shape.hidden, shape.num_heads * shape.head_dim, False),
        "gate up": (2 * shape.intermediate, shape.hidden, False),
        "down": (shape.hidden, shape.intermediate, False),
    }


def product_bytes(
    kernel: str, rows: int, columns: int, weight_bytes: float, activation_bytes: float, tokens: int
) -> tuple[float, float]:
    """The least a product must move, and what it does. activation_bytes: inputs, outputs, scales and bias."""
    least = weight_bytes + activation_bytes
    plan = plan_runs(kernel, rows, columns, weight_bytes, tokens)
    return least, least + (workspace_bytes(plan.num_runs, tokens, rows) if plan.parallel else 0)


def _product(
    shape: ModelShape, name: str, rows: int, columns: int, has_bias: bool, tokens: int, device: str
) -> Launch:
    size = shape.dtype.itemsize
    bias = random_tensor(rows, dtype=shape.dtype, device=device) if has_bias else None
    x = random_tensor(tokens, columns, dtype=shape.dtype, device=device)
    outputs = tokens * rows * size + (rows * size if has_bias else 0)
    run: Callable[[], object]
    if shape.weights.startswith("w4a16"):
        group = int(shape.weights.rpartition("-g")[2])
        kernel = "linear_w4a16"
        codes = random_tensor(rows, columns // 4, dtype=torch.int16, device=device)
        words = random_tensor(columns // group, rows, dtype=torch.int32, device=device)
        weight_bytes, inputs = codes.nbytes + words.nbytes, x.nbytes
        run = lambda: linear_w4a16(x, codes, words, rows, group, False, False, bias)  # noqa: E731
    elif shape.weights in EIGHT_BITS:
        kernel = f"linear_{shape.weights}"
        weight = random_tensor(rows, columns, dtype=EIGHT_BITS[shape.weights], device=device)
        scales = random_tensor(rows, dtype=torch.float32, device=device)
        tokens_x, token_scales = x.to(weight.dtype), random_tensor(tokens, dtype=torch.float32, device=device)
        weight_bytes, inputs = weight.nbytes + scales.nbytes, tokens_x.nbytes + token_scales.nbytes
        run = lambda: linear_w8a8(tokens_x, token_scales, weight, scales, bias, shape.dtype)  # noqa: E731
    else:
        kernel = "linear"
        dense = random_tensor(rows, columns, dtype=shape.dtype, device=device)
        weight_bytes, inputs = dense.nbytes, x.nbytes
        run = lambda: linear(x, dense, bias)  # noqa: E731
    least, moved = product_bytes(kernel, rows, columns, weight_bytes, inputs + outputs, tokens)
    return Launch(
        kernel="linear_w8a8" if shape.weights in EIGHT_BITS else kernel,
        case=f"{name}, {shape.weights}, {tokens} tokens",
        run=lambda: _discard(run()),
        tokens=tokens,
        num_bytes=least,
        moved_bytes=moved,
        flops=2.0 * tokens * rows * columns,
        needs="fp8" if shape.weights == "fp8" else "",
    )


def _quantisation(shape: ModelShape, columns: int, tokens: int, device: str) -> Launch:
    x = random_tensor(tokens, columns, dtype=shape.dtype, device=device)
    num_bytes = x.nbytes + tokens * columns + 4 * tokens
    return Launch(
        kernel="quantize_tokens",
        case=f"{columns} columns, {shape.weights}, {tokens} tokens",
        run=lambda: _discard(quantize_tokens(x, EIGHT_BITS[shape.weights])),
        tokens=tokens,
        num_bytes=num_bytes,
        moved_bytes=num_bytes,
        flops=4.0 * x.numel(),
        needs="fp8" if shape.weights == "fp8" else "",
    )


def _discard(result: object) -> None:
    """A launch's `run` returns nothing."""
