"""Ops run their kernels here: in Triton's interpreter, unless there is a GPU."""

import pytest


@pytest.fixture(autouse=True)
def _triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXJUDGE_BACKEND", "triton")
