"""Saving a run: at the steps that are due, at its end, and before an error ends it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from distill_core.errors import OtherRankFailed, UserError
from distill_core.run.checkpoint import Checkpoints
from distill_core.run.display import Display
from distill_core.run.failures import is_consequence
from distill_core.run.folder import RunFolder
from distill_core.run.lockstep import announce_failure
from distill_core.run.parts import Split, split
from distill_core.run.state import RunState
from distill_core.system import distributed
from distill_core.system.process import Interrupt

SECONDS_TO_FINISH = 5.0
"""How long a rank that ends for an error waits for the checkpoint that is being written."""


@dataclass(frozen=True)
class _Writing:
    """A checkpoint that is being written; `best` is its score where that is the best, `problem` why it failed."""

    step: int
    best: float | None
    problem: Future[str | None]


class Saver:
    """Writes a run's state to its folder while the run goes on. Every rank calls the methods.

    The state is copied at once; a thread writes it, one checkpoint at a time.
    """

    def __init__(
        self, state: RunState, folder: RunFolder, checkpoints: Checkpoints, interrupt: Interrupt, display: Display
    ) -> None:
        self.state, self.folder, self.checkpoints = state, folder, checkpoints
        self.display = display
        self.saved = state.step if state.resumed is not None else None
        """The step of the last checkpoint that this process wrote or resumed from."""
        self.unsaved: str | None = None
        """Why the step of the last checkpoint that was begun and settled is in none."""
        self._best = state.best
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: _Writing | None = None
        self._busy = False
        interrupt.busy = lambda: self._busy

    def begin(self) -> None:
        """Start writing a checkpoint, also as the best one if the step has the best score. Waits for the one before."""
        self.settle()
        state = self.state
        best, content = state.best_step == state.step, split(state.state_dict())
        self._busy = True  # before the thread starts, which a signal may come before
        problem = self._thread.submit(self._write, state.step, content, best)
        self._writing = _Writing(state.step, state.best if best else None, problem)

    def settle(self) -> bool:
        """Wait for what is being written. Returns whether it was, the same on all ranks; True where nothing is."""
        if self._writing is None:
            return True
        writing = self._writing
        self.unsaved = writing.problem.result()
        self._writing = None
        if self.unsaved is None:
            self.saved = writing.step
            if writing.best is not None:
                self._best = writing.best
        elif writing.best is not None:
            self.state.best, self.state.best_step = self._best, None  # that of the best checkpoint there is
        return self.unsaved is None

    def save(self) -> bool:
        """`begin` and `settle`. A failure is a warning; the next save may succeed."""
        self.begin()
        return self.settle()

    def close(self) -> None:
        """Let the thread end, once it has written what was begun."""
        self._thread.shutdown()

    def _write(self, step: int, content: Split, best: bool) -> str | None:
        """In the thread: `_write_whole`."""
        try:
            return self._write_whole(step, content, best)
        finally:
            self._busy = False

    def _write_whole(self, step: int, content: Split, best: bool) -> str | None:
        """Each rank its part, then the first the checkpoint that names them. Returns why that failed."""
        number, digest, problem = distributed.rank(), None, None
        if number < content.count > 1:
            try:
                digest = self.checkpoints.save_part(step, number, content.count, content.parts)
            except UserError as error:
                problem = str(error)
        digests, problems = zip(*distributed.gather_objects((digest, problem), saving=True), strict=True)
        problem = next(filter(None, problems), None)
        if number == 0 and problem is None:
            named = {"spread": content.spread, "parts": list(filter(None, digests))} if content.spread else {}
            try:
                self.folder.restore(self.state.recipe)
                self.checkpoints.save(step, content.common | named, best=best)
            except UserError as error:
                problem = str(error)
        if number == 0 and problem is not None:
            problem = f"{problem}. Step {step} is not saved; {self._last_saved()}"
            self.display.warn(problem)
        reason: str | None = distributed.gather_objects(problem, saving=True)[0]
        return reason

    def _last_saved(self) -> str:
        """On the disk, where a thread may be about to finish one."""
        if self._writing is not None and threading.current_thread() is threading.main_thread():
            wait([self._writing.problem], SECONDS_TO_FINISH)
        steps = self.checkpoints.steps()
        return f"the last checkpoint is of step {steps[-1]}" if steps else "there is no checkpoint yet"

    def save_before(self, error: Exception, settle: Callable[[], None]) -> None:
        """Save the last complete step before an error ends the run, if it is not saved yet, and report it.

        `settle` (`LateResults`) is called where all ranks stand between the same two steps.
        """
        step, display = self.state.step, self.display
        if not isinstance(error, OtherRankFailed):
            if is_consequence(error):
                display.warn(f"step {step} is not saved: another rank has ended; {self._last_saved()}")
                return
            try:
                announce_failure(in_step=self.state.train_step.running)
            except distributed.RanksApart:
                why = "the other ranks are in the middle of a step"
                display.warn_here(f"rank {distributed.rank()}: step {step} is not saved: {why}; {self._last_saved()}")
                return
        self.settle()
        last = self._last_saved()
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
