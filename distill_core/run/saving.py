"""Saving a run: at the steps that are due, at its end, and before an error ends it."""

from __future__ import annotations

from collections.abc import Callable

from distill_core.errors import OtherRankFailed, UserError
from distill_core.run.checkpoint import Checkpoints
from distill_core.run.display import Display
from distill_core.run.failures import is_consequence
from distill_core.run.folder import RunFolder
from distill_core.run.lockstep import announce_failure
from distill_core.run.state import RunState
from distill_core.system import distributed
from distill_core.system.process import Interrupt


class Saver:
    """Writes a run's state to its folder. Every rank calls the methods; the first one writes."""

    def __init__(
        self, state: RunState, folder: RunFolder, checkpoints: Checkpoints, interrupt: Interrupt, display: Display
    ) -> None:
        self.state, self.folder, self.checkpoints = state, folder, checkpoints
        self.interrupt, self.display = interrupt, display
        self.saved = state.step if state.resumed is not None else None
        """The step of the last checkpoint that this process wrote or resumed from."""
        self.unsaved: str | None = None
        """Why the step of the last `save` is in no checkpoint."""
        self._best = state.best

    def save(self) -> bool:
        """Write a checkpoint, also as the best one if the step has the best score.

        Returns whether it was written, the same on all ranks. A failure is a warning; the next save may succeed.
        """
        state = self.state
        content, best = state.state_dict(), state.best_step == state.step
        problem = None
        if distributed.rank() == 0:
            try:
                self.folder.restore(state.recipe)
                with self.interrupt.finishing():
                    self.checkpoints.save(state.step, content, best=best)
            except UserError as error:
                steps = self.checkpoints.steps()
                last = f"the last checkpoint is of step {steps[-1]}" if steps else "there is no checkpoint yet"
                problem = f"{error}. Step {state.step} is not saved; {last}"
                self.display.warn(problem)
        self.unsaved = distributed.gather_objects(problem)[0]
        if self.unsaved is None:
            self.saved = state.step
        if best and self.unsaved is None:
            self._best = state.best
        elif best:
            state.best, state.best_step = self._best, None  # that of the best checkpoint there is
        return self.unsaved is None

    def save_before(self, error: Exception, settle: Callable[[], None]) -> None:
        """Save the last complete step before an error ends the run, if it is not saved yet, and report it.

        `settle` (`LateResults`) is called where all ranks stand between the same two steps.
        """
        step, display = self.state.step, self.display
        last = f"the last checkpoint is of step {self.saved}" if self.saved is not None else "there is no checkpoint"
        if not isinstance(error, OtherRankFailed):
            if is_consequence(error):
                display.warn(f"step {step} is not saved: another rank has ended; {last}")
                return
            try:
                announce_failure(in_step=self.state.train_step.running)
            except distributed.RanksApart:
                why = "the other ranks are in the middle of a step"
                display.warn_here(f"rank {distributed.rank()}: step {step} is not saved: {why}; {last}")
                return
        positions = distributed.gather_objects((step, self.state.train_step.whole))
        together = positions == [(step, True)] * distributed.world_size()
        if together:
            settle()
        if self.saved == step or (self.saved is None and step == 0):
            return
        if not together:
            display.warn(f"not saved: step {step + 1} was interrupted while it changed the weights; {last}")
            return
        try:
            saved = self.save()  # warns if it fails
        except Exception as second:
            display.warn(f"step {step} could not be saved either: {type(second).__name__}: {second}; {last}")
            return
        if saved:
            display.warn(
                f"saved at step {step}, before the error below. Continue with: distill resume {self.folder.path}"
            )
