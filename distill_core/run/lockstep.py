"""Ranks step together: all of them have a batch and make the step, or all of them stop between two steps."""

from __future__ import annotations

import signal
import time

from distill_core.batch import Batch
from distill_core.data.loader import LOOK_AHEAD, Loader
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

    With each step a rank says whether it holds the batches of the two steps that follow, and has no signal; that
    travels with the step's numbers, which the host reads a step late (`must_meet`, `hear`). Where all said so nobody
    asks again. Otherwise the ranks meet before they take a batch, on the host, at least once a second.

    Warns when a rank has waited for `stall_warning` seconds, and each time the wait has doubled.
    """

    def __init__(self, loader: Loader, interrupt: Interrupt, display: Display, stall_warning: float) -> None:
        self.loader, self.interrupt, self.display = loader, interrupt, display
        self.stall_warning = stall_warning
        self._taken, self._heard = 0, 0  # batches, and results of steps, since the start
        self._certain = 0  # so many batches every rank has, or has had

    def follow(self, loader: Loader) -> None:
        """Take the next batches from another loader, on all ranks, between two steps whose results are all heard."""
        self.loader, self._certain = loader, 0

    def must_meet(self) -> bool:
        """Whether the ranks have to meet before the step after the next, as far as this one knows."""
        return distributed.world_size() == 1 or self.interrupt.signal is not None or not self.loader.holds(LOOK_AHEAD)

    def hear(self, meet: bool) -> None:
        """Call with each step's result, in order: whether any rank's `must_meet` was true when it began."""
        self._heard += 1
        if not meet:
            self._certain = self._heard + LOOK_AHEAD

    def next_batch(self) -> Batch | None:
        """This rank's next batch, once every rank has its own; None where one of them got a signal.

        Raises `OtherRankFailed`, and `DataError` of the loader.
        """
        batch = self.loader.wait(0.0) if self._taken < self._certain else self._meet()
        self._taken += 1
        return batch

    def _meet(self) -> Batch | None:
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
