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
"""The state of a rank's next batch; all ranks act on the highest state among them."""
SECONDS_TO_ANSWER, SECONDS_IN_STEP = 30.0, 5.0
"""How long a failed rank waits for the others, to save with them the steps that are complete; and one that failed in
the middle of a step, where only ranks that fail alike can answer."""


class Lockstep:
    """The batches of a run, taken by all ranks at once.

    Warns when a rank has waited for `stall_warning` seconds, and each time the wait has doubled.
    """

    def __init__(self, loader: Loader, interrupt: Interrupt, display: Display, stall_warning: float) -> None:
        self.loader, self.interrupt, self.display = loader, interrupt, display
        self.stall_warning = stall_warning

    def next_batch(self) -> Batch | None:
        """This rank's next batch, once every rank has its own; None where one of them got a signal.

        Ranks synchronise here at least once a second while one of them waits for its batch, so that each hears of
        signals and of errors on other ranks between steps. Raises `OtherRankFailed`, and `DataError` of the loader.
        """
        start, warn_after = time.monotonic(), self.stall_warning
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
                raise OtherRankFailed("stopped because another rank failed")
            if batch is None and time.monotonic() - start >= warn_after:
                rank = f"rank {distributed.rank()}: " if distributed.world_size() > 1 else ""
                self.display.warn_here(f"{rank}no batch for {warn_after:g} s: {self.loader.waiting_for()}")
                warn_after *= 2


def announce_failure(*, in_step: bool) -> None:
    """Make the other ranks' `next_batch` raise `OtherRankFailed`. Raises `RanksApart` if they do not call it."""
    distributed.highest(FAILED, SECONDS_IN_STEP if in_step else SECONDS_TO_ANSWER)
