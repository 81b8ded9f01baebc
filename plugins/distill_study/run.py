"""Runs a study: each variant with each seed in a separate process; a stopped study continues.

The study's folder holds the run folders (VARIANT-seedN), `recipes/`, `logs/`, `calibration.json` (a budget of
seconds), `failed.json`, and at the end table.md, table.tex, table.json and study.png.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from distill_core import UserError, counted, write_whole
from distill_core.tools import Interrupt, RecipeErrors, Registry, RunFolder, run_recipe
from distill_study.calibrate import calibrated_steps, calibration_runs, drop_changed, keep_times
from distill_study.compare import differences
from distill_study.launch import Job, Launcher, in_use, not_scored, read_memory, state
from distill_study.live import StudyDisplay
from distill_study.plan import Run, StudyPlan


@dataclass
class Outcome:
    """The result: the signal that stopped the study, failed runs with reasons, and runs that others stopped."""

    runs: Sequence[Run] = ()
    signal: int | None = None
    failed: dict[str, str] = field(default_factory=dict)
    stopped: list[str] = field(default_factory=list)


class StudyRunner:
    """One study in one folder, `jobs` runs at a time."""

    def __init__(
        self,
        plan: StudyPlan,
        folder: Path,
        launcher: Launcher,
        registry: Registry,
        display: StudyDisplay,
        *,
        jobs: int = 1,
        retry: bool = False,
    ) -> None:
        self.plan, self.folder, self.launcher, self.registry = plan, folder, launcher, registry
        self.display, self.jobs, self.retry = display, jobs, retry
        self.interrupt = Interrupt(display.warn, "stopping the runs; they are saved ...")

    def run(self) -> Outcome:
        """Run what is not done yet. Raises `UserError` when the folder holds runs of different recipes."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be created: {error}. Choose another folder with --runs.") from error
        try:
            lock = RunFolder(self.folder)  # held for as long as it lives
            lock.lock()
        except UserError:
            raise UserError(f"{self.folder}: another `distill ablate` is running this study") from None
        with self.interrupt.listening():
            steps = None
            if self.plan.study.budget is not None and self.plan.study.budget.seconds is not None:
                pending = calibration_runs(self.plan, self.folder)
                if pending:
                    self.display.say(f"timing {counted(len(pending), 'variant')} for a budget of seconds ...")
                    drop_changed(pending, self.folder / "calibration", self.registry)
                    # one at a time, so that they do not slow one another down
                    outcome = self._train(pending, self.folder / "calibration", 1)
                    if outcome.signal is not None:
                        return outcome
                    if outcome.failed or outcome.stopped:
                        lines = [f"{name}: {why}" for name, why in outcome.failed.items()]
                        lines += [f"{name}: stopped" for name in outcome.stopped]
                        raise UserError("\n".join(f"calibration of {line}" for line in lines))
                    keep_times(self.plan, self.folder, pending)
                steps = calibrated_steps(self.plan, self.folder)
            runs = self.plan.runs(steps)
            self._require_unchanged(runs)
            self.display.runs = runs
            with self.display:
                return self._train(runs, self.folder, self.jobs)

    def _require_unchanged(self, runs: Sequence[Run]) -> None:
        """Existing runs must have the recipes of the study. Raises `RecipeErrors`."""
        errors = []
        for run in runs:
            folder = self.folder / run.name
            if state(folder) == "new":
                continue
            recipe = run_recipe(folder, self.registry)
            paths = differences([recipe, run.recipe])
            if paths:
                path, (old, new) = next(iter(paths.items()))
                ellipsis = f", and {len(paths) - 1} more" if len(paths) > 1 else ""
                errors.append(f"{folder}: was trained with {path} {old}; the study now says {new}{ellipsis}")
        if errors:
            raise RecipeErrors(
                [*errors, f"Give the changed study another `name:` (or --name), or remove {self.folder}."]
            )

    def _train(self, runs: Sequence[Run], folder: Path, jobs: int) -> Outcome:
        outcome = Outcome(runs)
        memory = folder / "failed.json"
        # a failed calibration ends the study, and is repeated when the study is started again
        earlier_failures = read_memory(memory) if folder == self.folder else {}
        pending: list[Run] = []
        done = 0
        for run in runs:
            run_folder = folder / run.name
            unscored = not_scored(run_folder)
            if unscored and self.retry:
                (run_folder / "report.json").unlink()  # so that it is evaluated again
            if state(run_folder) == "done" and not unscored:
                done += 1
                self._show_finished(run, folder)
            elif (unscored or run.name in earlier_failures) and not self.retry:
                outcome.failed[run.name] = _unscored(unscored) if unscored else earlier_failures[run.name]
                self.display.cells[run.name] = "failed"
            else:
                pending.append(run)
        if done or outcome.failed:
            self.display.say(
                f"{folder}: {done} of {counted(len(runs), 'run')} done, {len(outcome.failed)} failed before"
            )
        (folder / "recipes").mkdir(parents=True, exist_ok=True)
        running: dict[str, tuple[Run, Job, float]] = {}
        try:
            self._loop(pending, running, folder, jobs, outcome)
        except BaseException:
            self._kill(running)
            raise
        finally:
            failed = {
                name: why
                for name, why in {**earlier_failures, **outcome.failed}.items()
                if state(folder / name) != "done" or not_scored(folder / name)
            }
            if failed or memory.exists():
                write_whole(memory, json.dumps(failed, indent=1))
        outcome.signal = self.interrupt.signal
        return outcome

    def _loop(
        self,
        pending: list[Run],
        running: dict[str, tuple[Run, Job, float]],
        folder: Path,
        jobs: int,
        outcome: Outcome,
    ) -> None:
        signalled = False
        busy: set[str] = set()
        while running or (pending and self.interrupt.signal is None):
            if self.interrupt.signal is not None and not signalled:
                signalled = True
                for _, job, _ in running.values():
                    job.stop(self.interrupt.signal)
            for run in list(pending) if self.interrupt.signal is None else ():
                if len(running) >= jobs:
                    break
                if in_use(folder / run.name):
                    if run.name not in busy:
                        self.display.say(f"{run.name}: another process trains in its folder; waiting for it to end")
                    busy.add(run.name)
                    continue
                pending.remove(run)
                if state(folder / run.name) == "done":  # by that other process
                    self._record_end(run, 0, None, folder, outcome)
                    continue
                path = folder / "recipes" / f"{run.name}.yaml"
                path.write_text(run.recipe.to_yaml(), encoding="utf-8")
                if folder == self.folder:  # not a calibration
                    self.display.started(run)
                running[run.name] = (run, self.launcher.start(folder, run.name), time.monotonic())
            for name, (run, job, start) in list(running.items()):
                code = job.poll()
                if code is not None:
                    del running[name]
                    self._record_end(run, code, time.monotonic() - start, folder, outcome)
            self.display.update([run for run, _, _ in running.values()])
            time.sleep(0.1)

    def _record_end(self, run: Run, code: int, seconds: float | None, folder: Path, outcome: Outcome) -> None:
        log = folder / "logs" / f"{run.name}.log"
        if unscored := not_scored(folder / run.name):
            outcome.failed[run.name] = _unscored(unscored)
            self.display.cells[run.name] = "failed"
            self.display.warn(f"{run.name}: {outcome.failed[run.name]} (see {log}); the other runs continue")
        elif state(folder / run.name) == "done":
            self._show_finished(run, folder, seconds)
            if code != 0:  # after writing its report
                self.display.warn(f"{run.name}: {_last_lines(log)}")
        elif code < 0 or code > 128:
            outcome.stopped.append(run.name)
            self.display.cells[run.name] = "stopped"
            number = -code if code < 0 else code - 128
            name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
            if self.interrupt.signal is None:
                self.display.warn(f"{run.name}: stopped by {name}; see {log}")
        else:
            outcome.failed[run.name] = f"exit code {code}: {_last_lines(log)}"
            self.display.cells[run.name] = "failed"
            self.display.warn(
                f"{run.name}: failed with {outcome.failed[run.name]} (see {log}); the other runs continue"
            )

    def _show_finished(self, run: Run, folder: Path, seconds: float | None = None) -> None:
        if folder == self.folder:  # not a calibration
            self.display.finished(run, seconds)

    def _kill(self, running: dict[str, tuple[Run, Job, float]]) -> None:
        """On a second signal or an error: signal the runs once more, which ends them at once."""
        for _, job, _ in running.values():
            if job.poll() is None:
                job.stop(signal.SIGTERM)


def _unscored(lines: Sequence[str]) -> str:
    return f"trained, but not evaluated: {'; '.join(lines)}"


def _last_lines(log: Path) -> str:
    """The last lines of a run's output, in one line."""
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return "it printed nothing"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    last = [line if len(line) <= 400 else f"{line[:400]} ..." for line in lines[-2:]]
    return " ".join(last) or "it printed nothing"
