"""Each step's numbers, read while the device computes the step after it."""

from __future__ import annotations

from collections.abc import Callable

from distill_core.batch import Batch
from distill_core.outputs import Progress
from distill_core.step import StepResult


class LateResults:
    """Hands each step's result on when the next step has been launched: the device has work while the host reads."""

    def __init__(self, handle: Callable[[list[str], StepResult, Progress], None]) -> None:
        """`handle` takes the keys of the step's samples, its result and its progress."""
        self.handle = handle
        self._unread: tuple[list[str], StepResult, Progress] | None = None

    def add(self, batch: Batch, result: StepResult, progress: Progress) -> None:
        """Call after each step, before it is counted: the one before is handed on, as the last that is counted."""
        self.settle()
        self._unread = batch.keys, result, progress

    def settle(self) -> None:
        """Hand on the last step that is counted; call before anything is saved or scored."""
        if self._unread is not None:
            unread, self._unread = self._unread, None
            self.handle(*unread)
