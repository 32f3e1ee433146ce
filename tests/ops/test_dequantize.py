"""Every block format against the gguf package, bit for bit; the compiled op against the torch reference."""

import gguf
import numpy as np
import pytest
import torch

from flexjudge_fast.ops.backend import has_compiled_ops
from flexjudge_fast.ops.dequantize import dequantize, dequantize_reference
from flexjudge_fast.ops.linear import quantized_linear
from flexjudge_fast.weights.formats import QUANT_FORMATS

FORMATS = [f.name for f in QUANT_FORMATS]


def random_blocks(name: str, rows: int, blocks: int, seed: int) -> torch.Tensor:
    found = next(f for f in QUANT_FORMATS if f.name == name)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (rows, blocks * found.block_bytes), dtype=torch.uint8, generator=generator)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal, NaN and infinities of broken scales included."""
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("rows", "blocks"), [(1, 1), (3, 1), (37, 3), (513, 2), (0, 2)])
def test_all_ways_agree(name, rows, blocks):
    data = random_blocks(name, rows, blocks, seed=rows)
    reference = dequantize_reference(data, name) if rows else torch.empty(0, 0)
    if rows:
        if not name.startswith(("I", "Z")):  # a format of our own
            with np.errstate(all="ignore"):
                oracle = gguf.quants.dequantize(data.numpy(), getattr(gguf.GGMLQuantizationType, name))
            assert same_bits(reference, torch.from_numpy(oracle))
        assert same_bits(dequantize(data, name), reference)
    assert dequantize(data, name).shape[0] == rows


def test_the_compiled_op_is_there():
    """The build of this checkout must have made it; without it the test above compares nothing."""
    assert has_compiled_ops()


@pytest.mark.parametrize("name", FORMATS)
def test_every_scale_bit_pattern(name):
    """All 65,536 half floats as the first scale, subnormal, infinite and NaN ones too."""
    data = random_blocks(name, 65536, 1, seed=1)
    offset = 208 if name == "Q6_K" else 0
    data[:, offset : offset + 2] = torch.arange(65536).to(torch.uint16).view(torch.uint8).reshape(-1, 2)
    assert same_bits(dequantize(data, name), dequantize_reference(data, name))


@pytest.mark.parametrize("name", ["I4_64", "I4_128"])
def test_own_formats_are_q4_1_with_longer_groups(name):
    """The same numbers as Q4_1 blocks that repeat the scale and offset for each 32 weights."""
    data = random_blocks(name, 7, 3, seed=4)
    blocks = data.view(7, 3, -1)
    tiles = blocks[:, :, 4:].unflatten(2, (-1, 16))
    heads = blocks[:, :, None, :4].expand(-1, -1, tiles.shape[2], -1)
    spread = torch.cat((heads, tiles), 3).flatten(1)
    assert same_bits(dequantize(data, name), dequantize(spread, "Q4_1"))


@pytest.mark.parametrize(("name", "bits"), [("Z4_32", 4), ("Z4_64", 4), ("Z4_128", 4), ("Z8_32", 8)])
def test_zero_points(name, bits):
    """scale * (code - zero), rounded once."""
    blocks = random_blocks(name, 9, 3, seed=5).view(27, -1)
    scales = torch.randn(27, 1, generator=torch.Generator().manual_seed(6))
    blocks[:, :4] = scales.view(torch.uint8)
    data = blocks[:, 5:].unflatten(1, (-1, 16))
    codes = blocks[:, 5:] if bits == 8 else torch.cat((data & 15, data >> 4), 2).flatten(1)
    want = scales * (codes.float() - blocks[:, 4:5].float())
    assert torch.equal(dequantize(blocks.reshape(9, -1), name).view(27, -1), want)


@pytest.mark.parametrize("bad", ["Q9_9", "q4_0", ""])
def test_unknown_format(bad):
    with pytest.raises((RuntimeError, KeyError)):
        dequantize(random_blocks("Q4_0", 2, 2, 0), bad)


def test_broken_rows_are_refused():
    with pytest.raises(RuntimeError, match="whole Q4_0"):
        dequantize(torch.zeros(2, 19, dtype=torch.uint8), "Q4_0")


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("tokens", [1, 5])
def test_quantized_linear(name, tokens):
    """Against float64 on the same weights; more rows than one chunk, and a ragged last one."""
    generator = torch.Generator().manual_seed(2)
    data = random_blocks(name, 2100, 2, seed=3)
    data = data.view(2100, 2, -1)
    scale = torch.tensor([0.01], dtype=torch.float16).view(torch.uint8)
    found = next(f for f in QUANT_FORMATS if f.name == name)
    for offset in found.half_offsets:
        data[..., offset : offset + 2] = scale
    for offset in found.float_offsets:
        data[..., offset : offset + 4] = scale.view(torch.float16).float().view(torch.uint8)
    data = data.reshape(2100, -1)
    columns = dequantize_reference(data[:1], name).shape[1]
    x = torch.randn(tokens, columns, generator=generator)
    want = x.double() @ dequantize_reference(data, name).double().T
    got = quantized_linear(x, data, name)
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
