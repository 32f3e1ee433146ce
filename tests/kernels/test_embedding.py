"""Embeddings of tokens and media: the very rows."""

from collections.abc import Iterator

import pytest
import torch

from flexjudge_fast.ops.embedding import embedding, embedding_reference
from tests.interpreted import SWEEP, in_nan

NUM_CASES = 200 * SWEEP
HIDDEN = (1, 7, 8, 63, 64, 65, 128, 129, 200, 256)


def _cases(
    device: str = "cpu", table_dtype: torch.dtype | None = None
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    """ids, table and media; media alone, none of them, the last row of either."""
    for seed in range(NUM_CASES):
        g = torch.Generator().manual_seed(seed)
        tokens, hidden = (0, 1, 2, 7, 20)[seed % 5], HIDDEN[seed // 5 % len(HIDDEN)]
        vocab, num_media = (1, 33)[seed // 50 % 2], (0, 1, 9)[seed % 3]
        dtype = table_dtype or (torch.float16, torch.float32)[seed % 2]
        table = in_nan(torch.randn(vocab, hidden, generator=g).to(dtype), device)
        media = torch.randn(num_media, hidden, generator=g).to((torch.float32, torch.float16)[seed // 2 % 2])
        ids = torch.randint(vocab + num_media, (tokens,), generator=g)
        ids[: tokens // 3] = vocab + num_media - 1
        yield ids.to(device), table, in_nan(media, device) if num_media else None


def test_gives_the_very_rows() -> None:
    for ids, table, media in _cases():
        out = embedding(ids, table, media)
        assert out.dtype == table.dtype
        assert torch.equal(out, embedding_reference(ids, table, media))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_in_bfloat16() -> None:
    for ids, table, media in _cases("cuda", torch.bfloat16):
        assert torch.equal(embedding(ids, table, media), embedding_reference(ids, table, media))
