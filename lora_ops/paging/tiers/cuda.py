"""All that paging asks of a CUDA device: streams, events, pinned memory, copies. Nothing else in it needs a GPU.

The tier above speaks to the protocol `Device`; the tests put a simulated device there, whose streams run late and in
every order that events allow.
"""

from __future__ import annotations

import mmap
from typing import Any, Protocol

import torch
from torch import Tensor

from lora_ops.paging.errors import PagingError


class Event(Protocol):
    """A point in a stream's work."""

    def query(self) -> bool:
        """Whether the work before it is done."""

    def synchronize(self) -> None:
        """Block the host until it is."""


class Device(Protocol):
    """Streams run what is enqueued on each in order, and differ among themselves by what events say and no more."""

    name: str

    def new_stream(self) -> Any:
        """A stream of its own."""

    def current_stream(self) -> Any:
        """The stream that the caller's work goes to."""

    def record(self, stream: Any) -> Event:
        """An event after all that was enqueued on a stream so far."""

    def wait(self, stream: Any, event: Event) -> None:
        """Let what is enqueued on a stream from now on wait for an event."""

    def copy(self, stream: Any, target: Tensor, source: Tensor) -> None:
        """Enqueue a copy between a frame and pinned memory."""

    def zero(self, stream: Any, target: Tensor) -> None:
        """Enqueue filling a frame with zeros."""

    def new_frame(self, nbytes: int) -> Tensor:
        """Device memory, uint8 [nbytes], zero-filled on the current stream."""

    def pin(self, nbytes: int) -> Tensor:
        """Pinned host memory, uint8 [nbytes]; raises PagingError if there is none."""

    def unpin(self, memory: Tensor) -> None:
        """Give pinned memory back; no stream may use it any more."""


class CudaDevice:
    """A CUDA device.

    Args:
        device: with its index, or the current one.
    """

    name = "cuda"

    def __init__(self, device: torch.device) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self._device = torch.device("cuda", index)

    def new_stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self._device)

    def current_stream(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self._device)

    def record(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        event = torch.cuda.Event(blocking=True)  # who waits for it on the host sleeps
        event.record(stream)
        return event

    def wait(self, stream: torch.cuda.Stream, event: Any) -> None:
        stream.wait_event(event)

    def copy(self, stream: torch.cuda.Stream, target: Tensor, source: Tensor) -> None:
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)

    def zero(self, stream: torch.cuda.Stream, target: Tensor) -> None:
        with torch.cuda.stream(stream):
            target.zero_()

    def new_frame(self, nbytes: int) -> Tensor:
        return torch.zeros(nbytes, dtype=torch.uint8, device=self._device)

    def pin(self, nbytes: int) -> Tensor:
        # Not torch's pinned allocator: it rounds up to powers of two, and what is freed stays pinned.
        try:
            memory = torch.frombuffer(mmap.mmap(-1, nbytes), dtype=torch.uint8)
        except OSError as error:
            raise PagingError(f"pinned memory: cannot allocate {nbytes} bytes: {error.strerror}") from error
        with torch.cuda.device(self._device):
            status = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), nbytes, 0)
        if int(status):
            raise PagingError(
                f"pinned memory: cannot pin {nbytes} bytes (CUDA error {int(status)}); "
                "set a smaller host_budget, or raise the limit of locked memory"
            )
        return memory

    def unpin(self, memory: Tensor) -> None:
        with torch.cuda.device(self._device):
            status = torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())
        if int(status):
            raise PagingError(f"pinned memory: cannot unpin {memory.nbytes} bytes (CUDA error {int(status)})")
