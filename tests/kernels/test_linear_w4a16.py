"""Products with 4-bit weights against float64; their bits in any batch, their bytes; what repacking keeps."""

from collections.abc import Callable, Iterator

import pytest
import torch

from flexjudge_fast.kernels.catalog import ModelShape
from flexjudge_fast.kernels.catalog_linear import layer_matrices, product_bytes
from flexjudge_fast.ops.dequantize import dequantize_reference
from flexjudge_fast.ops.linear_w4a16 import (
    W4_FORMATS,
    W4Matrix,
    dequantize_w4,
    linear_w4a16,
    linear_w4a16_reference,
    repack_w4,
    repack_w4_blocks,
    unpack_w4,
)
from tests.interpreted import SWEEP, add_in_order, count_loads, in_nan

NUM_CASES = 200 * SWEEP
NUM_PARTS = 10
TOKENS = (0, 1, 2, 15, 16, 17, 33, 64, 65, 130)
BLOCK_BYTES = {"Q4_0": (32, 18), "Q4_1": (32, 20), "I4_64": (64, 36), "I4_128": (128, 68)}
BLOCK_BYTES |= {"Z4_32": (32, 21), "Z4_64": (64, 37), "Z4_128": (128, 69)}


@pytest.fixture
def in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    add_in_order(monkeypatch)


def _matrix(
    g: torch.Generator,
    rows: int,
    columns: int,
    group: int,
    has_offset: bool,
    dtype: torch.dtype = torch.float16,
    scale: float = 0.05,
) -> W4Matrix:
    codes = torch.randint(0, 16, (rows, columns), generator=g, dtype=torch.uint8)
    numbers = (rows, columns // group)
    scales = (torch.randn(numbers, generator=g) * scale).to(dtype)
    zeros = torch.randint(0, 17, numbers, generator=g)
    offsets = (torch.randn(numbers, generator=g) * scale * 8).to(dtype)
    return repack_w4(codes, scales, offsets if has_offset else zeros, has_offset)


def _cases(part: int) -> Iterator[tuple[torch.Tensor, W4Matrix, torch.Tensor | None]]:
    for seed in range(part, NUM_CASES, NUM_PARTS):
        g = torch.Generator().manual_seed(seed)

        def pick(*options: object, g: torch.Generator = g) -> object:
            return options[int(torch.randint(len(options), (1,), generator=g))]

        tokens = TOKENS[seed // NUM_PARTS % len(TOKENS)]
        group = (32, 64, 128)[seed % 3]
        rows = int(str(pick(1, 3, 63, 64, 65, 129, 200)))
        columns = group * int(str(pick(*range(1, 256 // group + 1))))
        dtype = (torch.float16, torch.float32)[seed % 2]
        scale = float(str(pick(1e-4, 0.05, 1.0)))
        stored = torch.bfloat16 if seed % 4 == 3 else torch.float16
        weight = _matrix(g, rows, columns, group, bool(seed // 3 % 2), stored, scale)
        x = (torch.randn(tokens, columns, generator=g) * float(str(pick(1e-3, 1.0, 10.0)))).to(dtype)
        bias = torch.randn(rows, generator=g).to(dtype) if seed // 6 % 2 else None
        yield x, weight, bias


def _expected(x: torch.Tensor, weight: W4Matrix, bias: torch.Tensor | None) -> torch.Tensor:
    """In float64, of weights that are rounded to the dtype of `x`."""
    out = x.double() @ dequantize_w4(weight).to(x.dtype).double().T
    return out if bias is None else out + bias.double()


@pytest.mark.parametrize("part", range(NUM_PARTS))
def test_matches_float64(part: int) -> None:
    for x, weight, bias in _cases(part):
        out = linear_w4a16(in_nan(x), weight, bias if bias is None else in_nan(bias))
        expected = _expected(x, weight, bias)
        assert out.shape == expected.shape
        assert out.dtype == x.dtype
        assert torch.isfinite(out).all()
        if out.numel():
            error = (out.double() - expected).abs().amax(1)
            assert (error <= 1e-3 * expected.abs().amax(1) + 1e-7).all()


def test_the_reference_is_what_it_says() -> None:
    for x, weight, bias in _cases(1):
        torch.testing.assert_close(
            linear_w4a16_reference(x.double(), weight, None if bias is None else bias.double()),
            x.double() @ dequantize_w4(weight).double().T + (0 if bias is None else bias.double()),
        )


@pytest.mark.parametrize("group", [32, 64, 128])
def test_a_token_has_the_same_bits_in_any_batch(in_order: None, group: int) -> None:
    g = torch.Generator().manual_seed(1)
    weight = _matrix(g, 70, 256, group, has_offset=True)
    x, bias = torch.randn(130, 256, generator=g).half(), torch.randn(70, generator=g).half()
    batch = linear_w4a16(x, weight, bias)
    for count in (1, 2, 16, 17, 33, 65):
        assert torch.equal(linear_w4a16(x[:count], weight, bias), batch[:count])
    assert torch.equal(linear_w4a16(x[77:78], weight, bias), batch[77:78])


@pytest.mark.parametrize("name", W4_FORMATS)
def test_blocks_keep_every_bit(name: str) -> None:
    g = torch.Generator().manual_seed(2)
    group, size = BLOCK_BYTES[name]
    for rows, blocks in ((1, 1), (3, 2), (130, 5)):
        data = torch.randint(0, 256, (rows, blocks, size), generator=g, dtype=torch.uint8)
        halves = torch.randn(2, rows, blocks, 1, generator=g).half()
        if name.startswith("Z"):
            data[:, :, :4] = halves[0].float().view(torch.uint8)
        else:
            for i, at in enumerate(range(0, size - group // 2, 2)):  # halves that are numbers
                data[:, :, at : at + 2] = halves[i].view(torch.uint8)
        weight = repack_w4_blocks(data.flatten(1), name)
        assert weight.shape == (rows, blocks * group)
        assert torch.equal(dequantize_w4(weight), dequantize_reference(data.flatten(1), name))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_generic_weights_keep_every_bit(group: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(3)
    for rows, columns in ((1, group), (5, 3 * group), (129, 256)):
        codes = torch.randint(0, 16, (rows, columns), generator=g, dtype=torch.uint8)
        scales = torch.randn(rows, columns // group, generator=g).to(dtype)
        zeros = torch.randint(-3, 17, scales.shape, generator=g)
        weight = repack_w4(
            codes, scales.float(), zeros, has_offset=False
        )  # of whatever dtype, if it is exact
        kept = unpack_w4(weight)
        assert torch.equal(kept[0], codes)
        assert torch.equal(kept[1].float(), scales.float())
        assert torch.equal(kept[2].float(), zeros.float())


def test_groups_longer_than_128() -> None:
    codes = torch.randint(0, 16, (3, 512), dtype=torch.uint8)
    scales, zeros = torch.tensor([[0.5, 2.0]] * 3), torch.tensor([[8, 7]] * 3)
    weight = repack_w4(codes, scales, zeros, has_offset=False)
    expected = (codes.float() - zeros.float().repeat_interleave(256, 1)) * scales.repeat_interleave(256, 1)
    assert torch.equal(dequantize_w4(weight), expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda codes: repack_w4(codes, torch.ones(2, 16), torch.ones(2, 16), False),
            "groups are 32, 64 or n",
        ),
        (
            lambda codes: repack_w4(codes, torch.full((2, 2), 0.1), torch.ones(2, 2), False),
            "neither",
        ),
    ],
)
def test_what_would_lose_bits_is_refused(make: Callable[[torch.Tensor], W4Matrix], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(torch.zeros(2, 128, dtype=torch.uint8))


@pytest.mark.parametrize("tokens", [1, 16, 64])
def test_reads_each_weight_once(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    """Counted from the kernel's own loads: weights once, activations once a tile of 64 rows."""
    g = torch.Generator().manual_seed(4)
    rows, columns = 256, 256
    weight = _matrix(g, rows, columns, 128, has_offset=False)
    x = torch.randn(tokens, columns, generator=g).half()
    counts = count_loads(monkeypatch, {"codes": weight.codes, "scales": weight.scales, "x": x})
    linear_w4a16(x, weight)
    assert counts["codes"] == rows * columns / 2
    assert counts["scales"] == 4 * rows * columns / 128
    assert counts["x"] == rows / 64 * x.nbytes
    assert counts["elsewhere"] == 0


@pytest.mark.parametrize("tokens", [1, 16, 64])
def test_bytes_are_those_of_the_catalog(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    """With runs in parallel, too: what is loaded from the workspace is half of what it moves."""
    g = torch.Generator().manual_seed(5)
    weight = _matrix(g, 128, 256, 128, has_offset=False)
    x = torch.randn(tokens, 256, generator=g).half()
    counts = count_loads(monkeypatch, {"codes": weight.codes, "scales": weight.scales, "x": x})
    linear_w4a16(x, weight)
    least, moved = product_bytes("linear_w4a16", 128, 256, weight.nbytes, 0, tokens)
    assert counts["codes"] + counts["scales"] == least
    assert 2 * counts["elsewhere"] == moved - least
    assert (moved > least) == (tokens < 64)


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
def test_bytes_at_seven_billion_parameters(monkeypatch: pytest.MonkeyPatch, capability: int) -> None:
    """From 16 tokens on sm_90 has more workspace, which stays in its L2: so 64 tokens take 41 us, not 66."""
    for module in ("tiles", "runs"):
        monkeypatch.setattr(f"flexjudge_fast.kernels.{module}.capability", lambda: capability)
    for rows, columns, has_bias in layer_matrices(ModelShape()).values():
        for tokens in range(1, 65):
            weights = rows * columns / 2 + 4 * rows * columns / 128
            rest = 2 * tokens * (rows + columns) + 2 * rows * has_bias
            least, moved = product_bytes("linear_w4a16", rows, columns, weights, rest, tokens)
            assert moved <= (1.25 if capability == 90 and tokens >= 16 else 1.05) * least


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("part", range(NUM_PARTS))
def test_on_a_gpu_in_bfloat16(part: int) -> None:
    cuda = torch.device("cuda")
    for some, matrix, some_bias in _cases(part):
        x, weight = in_nan(some.bfloat16(), "cuda"), matrix.to(cuda)
        bias = None if some_bias is None else in_nan(some_bias.bfloat16(), "cuda")
        out, expected = linear_w4a16(x, weight, bias), _expected(x, weight, bias)
        if out.numel():
            error = (out.double() - expected).abs().amax(1)
            assert (error <= 5e-3 * expected.abs().amax(1) + 1e-6).all()  # bfloat16: 2^-9
            assert torch.equal(linear_w4a16(x[:1], weight, bias), out[:1])
