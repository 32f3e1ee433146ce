"""The instruction sets of the compiled kernels that this processor runs."""

import pytest
import torch

from flexjudge_fast.ops.backend import has_compiled_ops

ISAS = ("scalar", "avx2", "avx512_vnni", "avx512_bf16")


@pytest.fixture
def compiled():
    if not has_compiled_ops():
        pytest.skip("the compiled ops are not built here")


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch, compiled):
    monkeypatch.setenv("FLEXJUDGE_ISA", request.param)
    try:
        assert torch.ops.flexjudge.isa() == request.param
    except RuntimeError as error:
        pytest.skip(str(error).splitlines()[0])
    return request.param
