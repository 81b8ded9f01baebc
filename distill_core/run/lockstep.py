"""Ranks step together: all of them have a batch and make the step, or all of them stop between two steps."""

from __future__ import annotations

import signal
import time

from distill_core.batch import Batch
from distill_core.data.loader import Loader
from distill_core.errors import OtherRankFailed
from distill_core.run.display import Display
from distill_core.system import distributed
from distill_core.system.process import Interrupt

READY, WAITING, STOPPED, FAILED = range(4)
"""What a rank says of its next batch; all ranks do what the highest of them says."""
SECONDS_TO_ANSWER = 30.0
"""For the other ranks, when one has failed and would save what all have done."""


class Lockstep:
    """The batches of a run, taken by all ranks at once.

    A line is shown where a rank waits for `stall_warning` seconds, and each time the wait has doubled.
    """

    def __init__(self, loader: Loader, interrupt: Interrupt, display: Display, stall_warning: float) -> None:
        self.loader, self.interrupt, self.display = loader, interrupt, display
        self.stall_warning = stall_warning

    def next_batch(self) -> Batch | None:
        """This rank's next batch, once every rank has its own; None where one of them got a signal.

        Ranks meet here at least once a second while one of them waits for its batch, so that none is out of reach of
        a signal or another's error in the middle of a step. Raises `OtherRankFailed`, and `DataError` of the loader.
        """
        begun, warn_after = time.monotonic(), self.stall_warning
        batch: Batch | None = None
        while True:
            stopped = self.interrupt.signal is not None
            if batch is None and not stopped:
                batch = self.loader.wait(min(1.0, warn_after))
            state = distributed.highest(STOPPED if stopped else WAITING if batch is None else READY)
            if state == READY:
                return batch
            if state == STOPPED:
                self.interrupt.signal = self.interrupt.signal or signal.SIGTERM
                return None
            if state == FAILED:
                raise OtherRankFailed("stopped because another rank failed; see that rank's message")
            if batch is None and time.monotonic() - begun >= warn_after:
                rank = f"rank {distributed.rank()}: " if distributed.world_size() > 1 else ""
                self.display.warn_here(f"{rank}no batch for {warn_after:g} s: {self.loader.waiting_for()}")
                warn_after *= 2


def announce_failure() -> None:
    """Have the other ranks' `next_batch` raise `OtherRankFailed`. Raises `RanksApart` where they do not come there."""
    distributed.highest(FAILED, SECONDS_TO_ANSWER)
