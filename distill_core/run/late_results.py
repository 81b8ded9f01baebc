"""What a run does with each step's numbers, done while the device computes the step after it."""

from __future__ import annotations

from distill_core.batch import Batch
from distill_core.outputs import Progress
from distill_core.run.display import Display
from distill_core.run.metrics import MetricsLog
from distill_core.run.nonfinite import NonfiniteSteps
from distill_core.run.state import RunState
from distill_core.step import StepResult


class LateResults:
    """Checks each step, logs and shows it: one step late, so that the device has work while the host reads."""

    def __init__(self, state: RunState, nonfinite: NonfiniteSteps, log: MetricsLog, display: Display) -> None:
        self.state, self.nonfinite, self.log, self.display = state, nonfinite, log, display
        self._unread: tuple[list[str], StepResult, Progress] | None = None

    def add(self, batch: Batch, result: StepResult, progress: Progress) -> None:
        """Call after each step, before `state` counts it: reads the one before. Raises `TrainingStopped`."""
        self.settle()
        self._unread = batch.keys, result, progress

    def settle(self) -> None:
        """Read the last step that `state` counts; call before anything is saved or scored. Raises `TrainingStopped`."""
        if self._unread is None:
            return
        (keys, result, progress), self._unread = self._unread, None
        self.nonfinite.check(keys, result)
        self.log.add(result, progress)
        self.display.step(self.state.step, self.log.rate, result.terms)
