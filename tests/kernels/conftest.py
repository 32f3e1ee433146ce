"""Ops run their kernels here: in Triton's interpreter, unless there is a GPU."""

import pytest

from tests.interpreted import patch_once


@pytest.fixture(autouse=True)
def _triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXJUDGE_BACKEND", "triton")
    patch_once(monkeypatch)
