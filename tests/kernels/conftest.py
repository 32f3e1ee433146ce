"""Ops run their kernels here: in Triton's interpreter, unless there is a GPU."""

import pytest
import triton
import triton.language as tl


@pytest.fixture(autouse=True)
def _triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXJUDGE_BACKEND", "triton")


@pytest.fixture(autouse=True)
def _fast_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spares most of the interpreter's time: at each call of a function in a kernel it patches the language
    again. Once is enough: the kernel's own is patched at its launch, that of Triton's functions stays so."""
    if not triton.knobs.runtime.interpret:
        return
    from triton.runtime.interpreter import InterpretedFunction

    patch_and_call = InterpretedFunction.__call__

    def call(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        if tl.core.is_builtin(tl.core.load):  # not patched
            return patch_and_call(self, *args, **kwargs)
        return self.rewrite()(*args, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "__call__", call)
