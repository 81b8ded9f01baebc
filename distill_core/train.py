"""The training loop. It knows no method: views, towers, losses and evaluations all come from the recipe."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distill_core.batch import Batch
from distill_core.data.loader import Loader
from distill_core.errors import StopRun, TrainingStopped
from distill_core.evaluate.score import TaskScore
from distill_core.objective import Objective
from distill_core.outputs import Progress
from distill_core.parallel import one_graph_each
from distill_core.recipe.sections import Recipe
from distill_core.run.assembly import assemble, prepare_process
from distill_core.run.caches import check_caches
from distill_core.run.checkpoint import Checkpoints
from distill_core.run.display import Display
from distill_core.run.environment import environment
from distill_core.run.failures import is_consequence
from distill_core.run.folder import RunFolder
from distill_core.run.late_results import LateResults
from distill_core.run.lockstep import Lockstep
from distill_core.run.metrics import MetricsLog
from distill_core.run.nonfinite import NonfiniteSteps
from distill_core.run.notices import Notices
from distill_core.run.report import report_run
from distill_core.run.resume import resume_run
from distill_core.run.saving import Saver
from distill_core.run.stages import due, enter
from distill_core.run.stalls import StallWatch
from distill_core.run.tracking import TrackedRun
from distill_core.run.validation import Validation
from distill_core.step import StepResult, TrainStep
from distill_core.system import distributed
from distill_core.system.process import Garbage, Interrupt, garbage_at_fixed_steps
from distill_core.system.transfer import Uploads

Callback = Callable[[int, dict[str, Any]], object]
"""(step, a row of metrics.jsonl), called when that is written; see `distill_core.fit`."""


@dataclass
class Result:
    """How a run ended."""

    folder: Path
    scores: list[TaskScore] = field(default_factory=list)
    """Of the final split: each with `address` (SIDE/TASK/SET/NAME) and `value`."""
    failed: list[str] = field(default_factory=list)
    """A line for each task that could not be scored."""
    signal: int | None = None
    """What stopped it before its end (SIGTERM stands for a callback, too): it is saved, and not scored. Else None."""
    unsaved: str | None = None
    """Why its last step is in no checkpoint."""


class Trainer:
    """One run: build what the recipe describes, train it, score it, report."""

    def __init__(
        self,
        recipe: Recipe,
        folder: RunFolder,
        *,
        resume: str | None = None,
        quiet: bool = False,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.recipe, self.folder, self.callbacks = recipe, folder, callbacks
        self._held: Exception | None = None
        self.device = device = prepare_process(recipe)
        if distributed.rank() == 0:
            folder.lock()
        source = recipe.data.source.build()
        source.prepare()
        evaluation_source = source
        if recipe.evaluate.source is not None:
            evaluation_source = recipe.evaluate.source.build()
            evaluation_source.prepare()
        assembly = assemble(recipe, source, device, resuming=resume is not None, quiet=quiet)
        self.state = state = assembly.state
        self.shards, self.load_reports = assembly.shards, assembly.load_reports

        self.display = Display(state.length.steps, quiet=quiet, rank=distributed.rank())
        folder.warn, folder.on_row = self.display.warn_here, self._call_back
        self.interrupt = Interrupt(self.display.warn)
        self.tracked = TrackedRun(recipe)
        self.checkpoints = Checkpoints(folder.path, recipe.train.checkpoint.keep)
        if resume is not None:
            resume_run(self.state, folder, self.checkpoints, resume, self.display)
        check_caches(recipe, state.loader, state.length.steps * state.length.batch_size)

        self.lockstep = Lockstep(state.loader, self.interrupt, self.display, recipe.data.stall_warning)
        self.stalls = StallWatch(
            folder.path, recipe.train.stall_warning, self.display.warn_here, lambda: self.loader.stacks()
        )
        self.saver = Saver(self.state, folder, self.checkpoints, self.interrupt, self.display)
        self.nonfinite = NonfiniteSteps(self.state, folder, self.saver, self.display)
        self.notices = Notices(self.state, folder, self.display)
        self.validation = Validation(self.state, evaluation_source, folder, self.tracked, self.display)

    @property
    def objective(self) -> Objective:
        """Of the stage that the run is in, as the next two."""
        return self.state.objective

    @property
    def train_step(self) -> TrainStep:
        """The objective's."""
        return self.state.train_step

    @property
    def loader(self) -> Loader:
        """The batches' source."""
        return self.state.loader

    def run(self) -> Result:
        """Train to the end (or to a signal), evaluate, report. What a callback or a row raised comes out when all is
        saved."""
        result = self._run()
        if self._held is not None:
            raise self._held
        return result

    def _run(self) -> Result:
        state, folder, display = self.state, self.folder, self.display
        state.start()
        display.step(state.step, None, {})
        complete = False
        try:
            with display, self.interrupt.listening():
                self.notices.start(self.load_reports)
                facts = self._track()
                self._train()
                if distributed.any_rank(self.interrupt.signal is not None):
                    number = self.interrupt.signal or signal.SIGTERM
                    if self.saver.unsaved is None:
                        why = self.interrupt.reason or signal.Signals(number).name
                        display.warn(f"{why}: saved at step {state.step}. Continue with: distill resume {folder.path}")
                    return Result(folder.path, signal=number)
                self.loader.close()
            try:
                evaluated = self.validation.test()
            except KeyboardInterrupt:
                done = "trained and saved" if self.saver.unsaved is None else "trained"
                display.warn(f"{done}, but not evaluated. Evaluate with: distill resume {folder.path}")
                return Result(folder.path, signal=signal.SIGINT)
            for line in evaluated.failed:
                display.warn(f"not evaluated: {line}")
            skipped_reads, *counted = state.data_totals()
            if distributed.rank() == 0:
                saved = self.saver.unsaved is None
                picture = report_run(state, folder, evaluated, facts, skipped_reads, *counted, saved=saved)
                self.tracked.report(state.step, picture, folder.path.name)
            complete = True
            return Result(folder.path, evaluated.scores, evaluated.failed, unsaved=self.saver.unsaved)
        finally:
            self.loader.close()
            self.saver.close()
            for line in folder.write_waiting():
                display.warn(line)
            self.tracked.finish(complete)
            folder.unlock()

    def _call_back(self, row: Mapping[str, Any]) -> None:
        for callback in self.callbacks:
            try:
                callback(row["step"], dict(row))
            except StopRun as stop:
                self.interrupt.stop(str(stop) or "stopped by a callback")
            except Exception as error:
                self.callbacks = ()
                self._hold(error, "in a callback")
                return

    def _hold(self, error: Exception, where: str) -> None:
        """Let an error end the run on all ranks, as a signal does. A row comes when the next step has changed the
        weights: what is raised then waits until that step is counted, and the state is saved between two steps."""
        self._held = self._held or error
        self.interrupt.stop(f"{type(error).__name__} {where}")

    def _train(self) -> None:
        """To the last step or a signal, and save; after an error too, where all ranks stand between two steps."""
        self.state.mark()
        log = MetricsLog(self.state, self.folder, self.tracked, self.recipe.train.log_every, self.display.warn)

        def handle(keys: list[str], result: StepResult, progress: Progress) -> None:
            try:
                self.lockstep.hear(result.meet)
                self.nonfinite.check(keys, result)
                log.add(result, progress)
                self.display.step(self.state.step, log.rate, result.terms)
            except TrainingStopped:  # the step after it has changed nothing
                raise
            except Exception as error:
                if is_consequence(error):  # nothing is saved
                    raise
                self._hold(error, f"in the row of step {self.state.step}")

        results = LateResults(handle)
        try:
            with one_graph_each(), self.stalls.running(), garbage_at_fixed_steps() as garbage:
                self._loop(log, results, garbage)
            self.saver.save()
        except Exception as error:
            self.saver.save_before(error, results.settle)
            raise

    def _loop(self, log: MetricsLog, results: LateResults, garbage: Garbage) -> None:
        """Step after step. The host reads the numbers of step t only when step t + 1 is launched:

        launch t + 1   changes the weights, while `state.step` still is t + 1, the number of steps that are counted
        handle t       its row, values that are not finite, what other ranks ask for
        count t + 1    weights, data and `state.step` agree again: what is raised in between waits for it (`_hold`)
        """
        state, steps = self.state, self.state.length.steps
        save_every, validate_every = self.recipe.train.checkpoint.every, self.recipe.evaluate.every
        upload = Uploads(self.device)
        self.stalls.step(state.step)
        while state.step < steps and (batch := self._next_batch(log, results)) is not None:
            self.notices.batch(batch)
            log.look(batch)
            state.skipped_samples += len(batch.skipped)
            state.samples_by_set.update(batch.sets)
            state.absences.update(batch.absences)
            progress = state.length.progress(state.step)
            result = self.train_step(upload(batch), progress, meet=self.lockstep.must_meet())
            results.add(batch, result, progress)  # which reads those of the step before
            state.step += 1
            state.mark()
            log.step_ended()
            self.stalls.step(state.step)
            self.tracked.views(state.step, int(progress.epoch))
            garbage.collect(state.step)
            validates, saves = (every and state.step % every == 0 for every in (validate_every, save_every))
            if state.step == steps or not (validates or saves):
                continue
            results.settle()
            with log.paused(), garbage.automatic():
                if validates:
                    self.saver.settle()  # which may change what the best score is
                    self.validation.validate()
                    state.mark()
                if saves or state.best_step == state.step:
                    self.saver.begin()
        results.settle()
        if validate_every and state.step == steps:
            self.saver.settle()
            with garbage.automatic():
                self.validation.validate()
            state.mark()

    def _next_batch(self, log: MetricsLog, results: LateResults) -> Batch | None:
        """That of the next step, whose stage is entered first."""
        state = self.state
        if (stage := due(state)) != state.stage:
            results.settle()
            with log.paused():
                # new workers are forked: a lock that a thread holds then, as of an import, stays locked in them
                self.tracked.settle()
                self.saver.settle()
                enter(state, stage)
            self.lockstep.follow(state.loader)
            options = ", ".join(self.recipe.stages[stage - 1].set)
            self.display.say(f"step {state.step}: stage {stage} of {len(self.recipe.stages)} begins: sets {options}")
        with log.waiting():
            return self.lockstep.next_batch()

    def _track(self) -> dict[str, Any]:
        """Tell the tracker of the run; returns what the run is made with, for the report. {} but on the first rank."""
        if distributed.rank() > 0:
            return {}
        facts = environment(self.device, [slot.package for slot in self.recipe.slots() if slot.package])
        resumed = self.state.resumed
        if resumed is not None and resumed.branch is not None:
            facts["branch"] = resumed.branch
        continues = resumed is not None and resumed.branch is None
        self.tracked.start(self.folder.path, facts, self.shards, continues, self.display.warn)
        return facts
