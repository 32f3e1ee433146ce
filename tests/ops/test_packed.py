"""Packed weights and their products: lossless, accurate on ragged shapes, the same bits in any company."""

import pytest
import torch

from flexjudge_fast.ops.dequantize import dequantize
from flexjudge_fast.ops.packed import pack, packed_linear, packed_linear_reference, unpack
from flexjudge_fast.weights.formats import QUANT_FORMATS

pytestmark = pytest.mark.usefixtures("compiled")

FORMATS = [f.name for f in QUANT_FORMATS]
DENSE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SHAPES_PER_FORMAT = 1000 // (len(FORMATS) + len(DENSE)) + 1


def random_weight(name: str, rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """Rows as a checkpoint stores them, with finite scales of either sign."""
    if name in DENSE:
        return torch.randn(rows, columns, generator=generator).to(DENSE[name])
    found = next(f for f in QUANT_FORMATS if f.name == name)
    units = columns // found.block_size
    blocks = torch.randint(0, 256, (rows, units, found.block_bytes), dtype=torch.uint8, generator=generator)
    for at in found.half_offsets:
        scales = (torch.randn(rows, units, generator=generator) * 0.05).half()
        blocks[:, :, at : at + 2] = scales.unsqueeze(-1).view(torch.uint8)
    for at in found.float_offsets:
        floats = torch.randn(rows, units, generator=generator) * 0.05
        blocks[:, :, at : at + 4] = floats.unsqueeze(-1).view(torch.uint8)
    return blocks.flatten(1)


def random_shape(name: str, generator: torch.Generator) -> tuple[int, int, int]:
    """Tokens, rows, columns: odd everywhere that the format allows."""

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    unit = 1 if name in DENSE else next(f.block_size for f in QUANT_FORMATS if f.name == name)
    most = {1: 300, 32: 12, 64: 6, 128: 4, 256: 3}[unit]
    return draw(1, 40), draw(1, 70), unit * draw(1, most)


def random_activations(tokens: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """Normal values with rare large ones, and rows of zeros."""
    x = torch.randn(tokens, columns, generator=generator)
    x = torch.where(torch.rand(x.shape, generator=generator) < 0.01, x * 1000, x)
    x[torch.rand(tokens, generator=generator) < 0.05] = 0
    return x


def relative_error(got: torch.Tensor, expected: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> float:
    """The largest error, relative to the lengths of the two vectors that were multiplied."""
    size = x.double().norm(dim=1, keepdim=True) * weight.double().norm(dim=1)
    return float(((got.double() - expected).abs() / size.clamp_min(1e-30)).max())


@pytest.mark.parametrize("name", [*FORMATS, *DENSE])
def test_pack_is_lossless(name):
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        _, rows, columns = random_shape(name, generator)
        source = random_weight(name, rows, columns, generator)
        matrix = pack(source, name, columns)
        expected = source.float() if name in DENSE else dequantize(source, name)
        assert torch.equal(unpack(matrix, torch.arange(rows)), expected)
        assert unpack(matrix, torch.tensor([], dtype=torch.int64)).shape == (0, columns)


def test_pack_and_unpack_check_sizes(isa):
    with pytest.raises(RuntimeError, match="whole units"):
        pack(torch.zeros(2, 18, dtype=torch.uint8), "Q4_0", 33)
    with pytest.raises(RuntimeError, match="does not match"):
        pack(torch.zeros(2, 17, dtype=torch.uint8), "Q4_0", 32)
    matrix = pack(torch.zeros(2, 3), "F32", 3)
    with pytest.raises(RuntimeError, match="out of range"):
        unpack(matrix, torch.tensor([2]))
    with pytest.raises(RuntimeError, match="size does not match"):
        packed_linear(torch.zeros(1, 4), matrix, 2, 1)


@pytest.mark.parametrize("name", [*FORMATS, *DENSE])
def test_linear_is_accurate(name, isa):
    """Every instruction set, over 1,000 shapes in all. 16-bit activations are held against plain float64."""
    generator = torch.Generator().manual_seed(2)
    for _ in range(SHAPES_PER_FORMAT):
        tokens, rows, columns = random_shape(name, generator)
        source = random_weight(name, rows, columns, generator)
        x = random_activations(tokens, columns, generator)
        matrix = pack(source, name, columns)
        weight = source.float() if name in DENSE else dequantize(source, name)
        exact = x.double() @ weight.double().T
        rounded = isa == "avx512_bf16" and name == "BF16"  # the one build and format that rounds
        limit = (1e-3 if columns >= 64 else 2**-9) if rounded else 1e-6 if name in DENSE else 1e-4
        assert relative_error(packed_linear(x, matrix, 2, 2), exact, x, weight) < limit
        seen = x.bfloat16().float() if rounded else x
        got, reference = packed_linear(x, matrix, 1, 1), packed_linear_reference(seen, source, name, 1)
        assert relative_error(got, reference, x, weight) < 2e-6


@pytest.mark.parametrize("terms", [1, 2])
@pytest.mark.parametrize("name", [*FORMATS, *DENSE])
def test_same_bits_in_any_company(name, terms, isa):
    """A token alone, in every batch size, at every place, on any number of threads."""
    generator = torch.Generator().manual_seed(3)
    rows, columns = 50, 768
    matrix = pack(random_weight(name, rows, columns, generator), name, columns)
    x = random_activations(430, columns, generator)
    alone = torch.cat([packed_linear(x[i : i + 1], matrix, terms, 1) for i in range(40)])
    for count in [*range(1, 30), 430]:
        for threads in (1, 2, 3):
            assert torch.equal(packed_linear(x[:count], matrix, terms, threads)[:40], alone[:count])
    assert torch.equal(packed_linear(x[5:23], matrix, terms, 2), alone[5:23])


def test_order_of_summation_shows_in_the_bits(isa):
    """What the test above rules out: summing the columns in another order changes bits."""
    generator = torch.Generator().manual_seed(4)
    source = torch.randn(64, 1024, generator=generator)
    x = torch.randn(8, 1024, generator=generator)
    order = torch.arange(1024).flip(0)
    forward = packed_linear(x, pack(source, "F32", 1024), 2, 1)
    backward = packed_linear(x[:, order].contiguous(), pack(source[:, order], "F32", 1024), 2, 1)
    assert not torch.equal(forward, backward)
    assert torch.allclose(forward, backward, atol=1e-3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["Q4_0", "Q6_K", "F32"])
def test_bad_values_are_not_hidden(name, bad, isa):
    generator = torch.Generator().manual_seed(5)
    matrix = pack(random_weight(name, 20, 256, generator), name, 256)
    x = torch.randn(3, 256, generator=generator)
    x[1, 77] = bad
    for terms in (1, 2):
        out = packed_linear(x, matrix, terms, 1)
        assert not out[1].isfinite().any()
        assert out[[0, 2]].isfinite().all()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", FORMATS)
def test_sums_at_their_largest(name, sign, isa):
    """Codes and activations all at the end of their range: no sum in between may overflow."""
    found = next(f for f in QUANT_FORMATS if f.name == name)
    blocks = torch.full((20, 2, found.block_bytes), 255, dtype=torch.uint8)
    for fill in (255, 127):  # 8-bit codes of ggml are signed, the six-bit scales of a byte too
        blocks[:] = fill
        for at in found.half_offsets:
            blocks[:, :, at : at + 2] = torch.tensor([0.01], dtype=torch.float16).view(torch.uint8)
        for at in found.float_offsets:  # and a zero point of 0 behind
            blocks[:, :, at : at + 4] = torch.tensor([0.01]).view(torch.uint8)
            blocks[:, :, at + 4] = 0
        source = blocks.flatten(1)
        matrix = pack(source, name, 2 * found.block_size)
        weight = dequantize(source, name)
        x = torch.full((7, 2 * found.block_size), 3.0 * sign)
        for terms in (1, 2):
            reference = packed_linear_reference(x, source, name, terms)
            assert relative_error(packed_linear(x, matrix, terms, 1), reference, x, weight) < 1e-5


@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e-20, 1e20, 1e30])
def test_extreme_sizes(size, isa):
    generator = torch.Generator().manual_seed(6)
    source = random_weight("Q4_1", 33, 64, generator)
    x = torch.randn(5, 64, generator=generator) * size
    expected = x.double() @ dequantize(source, "Q4_1").double().T
    got = packed_linear(x, pack(source, "Q4_1", 64), 2, 1).double()
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max() + 1e-29


def test_unknown_isa(monkeypatch):
    monkeypatch.setenv("FLEXJUDGE_ISA", "sse9")
    with pytest.raises(RuntimeError, match="FLEXJUDGE_ISA=sse9"):
        packed_linear(torch.zeros(1, 4), pack(torch.zeros(1, 4), "F32", 4), 2, 1)
