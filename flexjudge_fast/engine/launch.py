"""What travels between the stepper and a runner whose steps are launched and waited for apart."""

from collections.abc import Mapping, Sequence
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
        """Block until it is done. Its logits are valid until the next step is launched."""
        ...


@runtime_checkable
class LaunchingRunner(Protocol):
    """A `ModelRunner` that can launch a step behind one that is still under way."""

    def launch(
        self, batch: Batch, draws: Sequence[DeviceDraw], behind: Any, feed: Mapping[int, int]
    ) -> InFlight:
        """Start a step.

        Args:
            draws: drawn on the device, as soon as their rows are there.
            behind: the step before, still under way; `feed`: which of its draws each of the batch's
                chunks begins with, by the chunk's index.
        """
        ...
