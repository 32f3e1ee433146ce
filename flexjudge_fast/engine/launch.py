"""What travels between the stepper and a runner whose steps are launched and waited for apart."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from flexjudge_fast.engine.batch import Batch
from flexjudge_fast.engine.request import Request
from flexjudge_fast.ops.sample import Draw


@dataclass(frozen=True)
class DeviceDraw:
    """A token to be drawn on the device, of a request that needs no decision of the host for it."""

    request: Request
    draw: Draw
    banned: tuple[int, ...]


@dataclass(frozen=True)
class DeviceResult:
    """What a launched step gave: logits [num_rows, vocab_size], which rows are finite, its draws' tokens."""

    logits: torch.Tensor
    finite: Sequence[bool]
    tokens: Sequence[int]


class InFlight(Protocol):
    """A launched step."""

    def wait(self) -> DeviceResult:
        """Block until it is done. Its logits are valid until a step is launched that does not keep them."""
        ...


@dataclass(frozen=True)
class Behind:
    """The step before, which is still under way, and what is wanted of it.

    feed: the chunks, by index, that are one token which only the device knows: which of its draws that is.
    keep: its logits are still to be read.
    """

    flight: Any
    feed: Mapping[int, int]
    keep: bool


@runtime_checkable
class LaunchingRunner(Protocol):
    """A `ModelRunner` that can launch a step behind one that is still under way."""

    def launch(self, batch: Batch, draws: Sequence[DeviceDraw], behind: Behind | None) -> InFlight:
        """Start a step. draws: drawn on the device, as soon as their rows are there."""
        ...

    def beside(self) -> AbstractContextManager[object]:
        """Inside it, logits can be read while the next step runs."""
        ...
