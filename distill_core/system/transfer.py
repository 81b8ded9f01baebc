"""Copies between the host and the device that neither waits for."""

from __future__ import annotations

from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor


class Movable(Protocol):
    """Tensors that move together: `distill_core.batch.Batch`."""

    def to(self, where: torch.device) -> Self:
        """On another device, without waiting for the copy."""
        ...

    def record_stream(self, stream: torch.Stream) -> None:
        """As `Tensor.record_stream`."""
        ...


T = TypeVar("T", bound=Movable)


class Uploads:
    """Batches to the training device; on a GPU on a stream of their own, while it computes the step before."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def __call__(self, batch: T) -> T:
        """The batch on the device, for the current stream to use. It is in pinned memory, or the host waits."""
        if self._stream is None:
            return batch.to(self.device)
        with torch.cuda.stream(self._stream):
            moved = batch.to(self.device)
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._stream)
        moved.record_stream(current)  # its memory belongs to the other stream
        return moved


class Download:
    """A tensor on its way to the host, which waits for it when it is read."""

    def __init__(self, x: Tensor) -> None:
        self._host, self._arrived = x, None
        if x.device.type == "cuda":
            self._host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
            self._host.copy_(x, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def tolist(self) -> list[float]:
        """Its numbers."""
        if self._arrived is not None:
            self._arrived.synchronize()
        numbers: list[float] = self._host.tolist()
        return numbers
