"""Flex-Judge inference: `Judge` scores, compares and ranks answers; `Engine` generates. Loads lazily."""

from typing import TYPE_CHECKING, Any

from flexjudge_fast.errors import (
    CheckpointError,
    EngineStateError,
    FlexJudgeError,
    InvalidArgumentError,
    MediaError,
    NumericalError,
    PromptError,
    RequestTooLargeError,
    UnsupportedCheckpointError,
    UnsupportedMediaError,
)
from flexjudge_fast.verdict import BestOf, Verdict, Vote

if TYPE_CHECKING:
    from flexjudge_fast.engine.engine import Engine
    from flexjudge_fast.engine.sampling_params import SamplingParams
    from flexjudge_fast.judge import Judge
    from flexjudge_fast.prompts.judgement import Judgement, Response

__version__ = "0.1.0"

__all__ = [
    "BestOf",
    "CheckpointError",
    "Engine",
    "EngineStateError",
    "FlexJudgeError",
    "InvalidArgumentError",
    "Judge",
    "Judgement",
    "MediaError",
    "NumericalError",
    "PromptError",
    "RequestTooLargeError",
    "Response",
    "SamplingParams",
    "UnsupportedCheckpointError",
    "UnsupportedMediaError",
    "Verdict",
    "Vote",
]


def __getattr__(name: str) -> Any:
    """Torch and the engine load when they are first asked for."""
    from importlib import import_module

    homes = {
        "Engine": "engine.engine",
        "SamplingParams": "engine.sampling_params",
        "Judge": "judge",
        "Judgement": "prompts.judgement",
        "Response": "prompts.judgement",
    }
    if name not in homes:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{homes[name]}"), name)


def __dir__() -> list[str]:
    return __all__
