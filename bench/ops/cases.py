"""The ops as they are measured: one call each, its bytes and operations, and torch doing the same job."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from PIL import Image

from bench.engines import MissingError
from flexjudge_fast.ops.backend import has_compiled_ops
from flexjudge_fast.ops.image import patchify, resize_bicubic
from flexjudge_fast.ops.packed import PackedMatrix, WeightMemory, pack, packed_linear
from flexjudge_fast.ops.sample import Draw, sample_tokens
from flexjudge_fast.weights.formats import QUANT_FORMATS

Call = Callable[[], object]
DENSE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TOKENS = (1, 8, 512)
ROWS = COLUMNS = 4096
WORKING_SET = 256 << 20  # bytes that calls go through in turn, so that no cache holds them
HEADS = {"SmolLM2's heads": (9, 3, 64), "7B's heads": (28, 4, 128)}
VOCAB = 151_936
IMAGES = ((768, 1024), (448, 448))  # height and width


@dataclass(frozen=True)
class OpCase:
    """`call` does the op once; each call takes the next of several copies of its data.

    read_bytes, operations: of one call, `operations` of the kind `peak` ("int8" or "fp32").
    torch: what torch takes for the same job, by dtype.
    """

    name: str
    call: Call
    read_bytes: int
    operations: int
    peak: str
    torch: dict[str, Call] = field(default_factory=dict)


def all_cases(threads: int) -> Iterator[OpCase]:
    """Every case. MissingError when the compiled library is missing."""
    if not has_compiled_ops():
        raise MissingError("the compiled library is not built, or FLEXJUDGE_BACKEND=reference")
    yield from linear_cases([f.name for f in QUANT_FORMATS] + list(DENSE), TOKENS, threads)
    for label, heads in HEADS.items():
        yield attention_case(f"attention, {label}, prefill 512", heads, 1, 512, 512, threads)
        for batch in (1, 8):
            yield attention_case(
                f"attention, {label}, decode {batch} of 2048", heads, batch, 1, 2048, threads
            )
    for rows in (1, 8, 64):
        for greedy in (True, False):
            yield sampler_case(rows, greedy, threads)
    for size in IMAGES:
        yield image_case(size, threads)


def _cycle(calls: Sequence[Call]) -> Call:
    """Goes through the calls, one at each call."""
    order = itertools.cycle(calls)
    return lambda: next(order)()


def linear_cases(formats: Sequence[str], tokens: Sequence[int], threads: int) -> Iterator[OpCase]:
    """`packed_linear` [tokens, 4096] by [4096, 4096]; torch multiplies the dequantised weight."""
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(ROWS, COLUMNS, generator=generator) * COLUMNS**-0.5
    twins = {
        "fp32": [dense.clone() for _ in range(_copies(dense.nbytes))],
        "bf16": [dense.bfloat16() for _ in range(_copies(dense.nbytes // 2))],
    }
    for name in formats:
        matrices = _packed_copies(name, generator)
        for count in tokens:
            x = torch.randn(count, COLUMNS, generator=generator)
            torch_calls = {
                kind: _cycle([_multiply(x.to(copies[0].dtype), copy) for copy in copies])
                for kind, copies in twins.items()
            }
            for terms in (2, 1) if name not in DENSE else (2,):
                calls = [_packed_multiply(x, matrix, terms, threads) for matrix in matrices]
                setting = "" if name in DENSE else f", int{8 * terms}"
                operations = 2 * count * ROWS * COLUMNS * (1 if name in DENSE else terms)
                yield OpCase(
                    f"linear {name}{setting}, {count} tokens",
                    _cycle(calls),
                    matrices[0].data.nbytes + 4 * count * (ROWS + COLUMNS),
                    operations,
                    "fp32" if name in DENSE else "int8",
                    torch_calls,
                )


def _copies(num_bytes: int) -> int:
    return -(-WORKING_SET // num_bytes)


def _multiply(x: torch.Tensor, weight: torch.Tensor) -> Call:
    return lambda: F.linear(x, weight)


def _packed_multiply(x: torch.Tensor, matrix: PackedMatrix, terms: int, threads: int) -> Call:
    return lambda: packed_linear(x, matrix, terms, threads)


def _packed_copies(name: str, generator: torch.Generator) -> list[PackedMatrix]:
    """The same matrix many times over, on huge pages."""
    first = pack(random_weight(name, ROWS, COLUMNS, generator), name, COLUMNS)
    count = _copies(first.data.nbytes)
    memory = WeightMemory(count * first.data.nbytes)
    copies = []
    for _ in range(count):
        data = memory.take(first.data.nbytes)
        data.copy_(first.data)
        copies.append(PackedMatrix(data, name, ROWS, COLUMNS))
    return copies


def random_weight(name: str, rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """Rows as a checkpoint stores them: dense, or blocks of random codes with small scales."""
    if name in DENSE:
        return (torch.randn(rows, columns, generator=generator) * columns**-0.5).to(DENSE[name])
    found = next(f for f in QUANT_FORMATS if f.name == name)
    units = columns // found.block_size
    blocks = torch.randint(0, 256, (rows, units, found.block_bytes), dtype=torch.uint8, generator=generator)
    for at in found.half_offsets:
        scales = (torch.rand(rows, units, generator=generator) * 1e-3 + 1e-4).half()
        blocks[:, :, at : at + 2] = scales.unsqueeze(-1).view(torch.uint8)
    return blocks.flatten(1)


def attention_case(
    name: str, heads: tuple[int, int, int], batch: int, new: int, context: int, threads: int
) -> OpCase:
    """`packed_attention` of `batch` sequences, `new` tokens each, the last of `context`; float32 cache."""
    num_heads, num_kv_heads, head_dim = heads
    block_size = 16
    blocks = context // block_size
    layer_bytes = 2 * batch * context * num_kv_heads * head_dim * 4
    layers = _copies(layer_bytes)
    generator = torch.Generator().manual_seed(0)
    shape = (layers, 2, batch * blocks, block_size, num_kv_heads, head_dim)
    cache = torch.randn(shape, generator=generator)
    query = torch.randn(batch * new, num_heads, head_dim, generator=generator)
    tables = torch.arange(batch * blocks).reshape(batch, blocks)
    starts, lens = torch.arange(0, batch * new + 1, new), torch.full((batch,), context)
    scale = head_dim**-0.5

    def ours(layer: int) -> Call:
        return lambda: torch.ops.flexjudge.packed_attention(
            query, cache, layer, tables, starts, lens, scale, threads
        )

    dense = cache.view(layers, 2, batch, context, num_kv_heads, head_dim).transpose(3, 4)
    queries = query.view(batch, new, num_heads, head_dim).transpose(1, 2)

    def torchs(layer: int) -> Call:
        keys, values = dense[layer]
        return lambda: F.scaled_dot_product_attention(
            queries, keys, values, is_causal=new > 1, scale=scale, enable_gqa=True
        )

    pairs = sum(context - new + i + 1 for i in range(new))  # of a query and a key that it sees
    return OpCase(
        name,
        _cycle([ours(i) for i in range(layers)]),
        layer_bytes + 8 * batch * new * num_heads * head_dim,
        4 * batch * pairs * num_heads * head_dim,
        "fp32",
        {"fp32": _cycle([torchs(i) for i in range(layers)])},
    )


def sampler_case(rows: int, greedy: bool, threads: int) -> OpCase:
    """`sample_tokens` from `rows` rows of 151,936 logits: greedy, or temperature 0.4 and top-p 0.8."""
    generator = torch.Generator().manual_seed(0)
    copies = _copies(4 * rows * VOCAB)
    logits = torch.randn(copies, rows, VOCAB, generator=generator) * 3
    draws = [Draw(i, 0, 0.0 if greedy else 0.4, 1.0 if greedy else 0.8, 0.0, 0.5) for i in range(rows)]

    def ours(part: torch.Tensor) -> Call:
        return lambda: sample_tokens(part, draws, (), threads)

    def torchs(part: torch.Tensor) -> Call:
        return (lambda: part.argmax(-1)) if greedy else (lambda: _torch_top_p(part))

    return OpCase(
        f"sampler, {rows} rows, {'greedy' if greedy else 'top-p 0.8'}",
        _cycle([ours(part) for part in logits]),
        4 * rows * VOCAB,
        0,
        "fp32",
        {"fp32": _cycle([torchs(part) for part in logits])},
    )


def _torch_top_p(logits: torch.Tensor) -> torch.Tensor:
    probs, ids = torch.softmax(logits / 0.4, -1).sort(-1, descending=True)
    probs[probs.cumsum(-1) - probs >= 0.8] = 0
    return ids.gather(-1, torch.multinomial(probs, 1))


def image_case(size: tuple[int, int], threads: int) -> OpCase:
    """An image resized to 448 x 448, normalised and cut into patches; Pillow and NumPy do the same job."""
    side, patch, merge, temporal = 448, 14, 2, 2
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (1, *size, 3), dtype=torch.uint8, generator=generator)
    table = torch.linspace(-2, 2, 256).expand(3, 256).contiguous()
    image = Image.fromarray(frames[0].numpy())

    def ours() -> torch.Tensor:
        return patchify(resize_bicubic(frames, side, side, threads), table, patch, merge, temporal, threads)

    def pillow() -> torch.Tensor:
        resized = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))
        values = (np.float32(resized * (1 / 255)) - 0.5) / np.float32(0.25)
        unit = side // patch // merge
        split = values.transpose(2, 0, 1).reshape(3, unit, merge, patch, unit, merge, patch)
        patches = split.transpose(1, 4, 2, 5, 0, 3, 6)[:, :, :, :, :, None]
        whole = np.broadcast_to(patches, (*patches.shape[:5], temporal, patch, patch))
        return torch.from_numpy(whole.reshape(-1, 3 * temporal * patch * patch))

    taps = 4 * (size[0] * side + size[1] * side)  # of both passes: four weights reach each input pixel
    moved = frames.nbytes + 4 * 3 * temporal * side * side
    return OpCase(
        f"image, {size[1]} x {size[0]} to patches of {side} x {side}",
        ours,
        moved,
        2 * 3 * taps,
        "fp32",
        {"fp32": pillow},
    )
