"""What the GPU's runner needs of a device: to queue work, to know when it is done, and to record graphs."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch

Tensors = tuple[torch.Tensor, ...]


class Event(Protocol):
    """A point in a device's queue."""

    def wait(self) -> None:
        """Block until everything before it is done."""
        ...


class Graph(Protocol):
    """Work that was recorded once."""

    def replay(self) -> None:
        """Queue it again, on the same memory."""
        ...


class Device(Protocol):
    """A queue of work that runs in order, beside the host.

    Work that is submitted may read pinned memory of the host at any time until an event behind it is reached.
    """

    torch_device: torch.device

    def active(self) -> AbstractContextManager[object]:
        """Inside it, this is the device that kernels are launched on."""
        ...

    def submit(self, work: Callable[[], None]) -> None:
        """Queue `work`, which makes torch calls on the device and never waits for it."""
        ...

    def record(self) -> Event:
        """An event behind all that is queued."""
        ...

    def beside(self) -> AbstractContextManager[object]:
        """Inside it, torch calls do not wait for what is queued."""
        ...

    def capture(self, work: Callable[[], Tensors]) -> tuple[Graph, Tensors]:
        """Record what `work` queues, which has run before, so that everything it needs is compiled.

        Returns:
            The graph, and what `work` gives: each replay writes it anew.
        """
        ...


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Inside it, `device` is what Triton asks for its abilities and launches on, if it is a GPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class CudaDevice:
    """A GPU through torch: work is queued on the current stream as it is submitted."""

    def __init__(self, device: torch.device) -> None:
        self.torch_device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._beside = torch.cuda.Stream(device, priority=-1)

    def active(self) -> AbstractContextManager[object]:
        return on_device(self.torch_device)

    def submit(self, work: Callable[[], None]) -> None:
        work()

    def beside(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._beside)

    def record(self) -> Event:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.torch_device))
        return _CudaEvent(event)

    def capture(self, work: Callable[[], Tensors]) -> tuple[Graph, Tensors]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            found = work()
        return graph, found


class _CudaEvent:
    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def wait(self) -> None:
        self._event.synchronize()
