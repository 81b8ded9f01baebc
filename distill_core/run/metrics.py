"""The training rows of metrics.jsonl, and the speed computed from them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from distill_core.batch import Batch
from distill_core.collapse import CollapseRule
from distill_core.outputs import Progress
from distill_core.plan import DEFAULT_TEACHER
from distill_core.run.folder import RunFolder
from distill_core.run.state import RunState
from distill_core.run.tracking import TrackedRun
from distill_core.run.utilization import Utilization, peak_memory
from distill_core.step import StepResult
from distill_core.system import distributed


class MetricsLog:
    """Writes a row every `every` steps, and after the last. The clock runs from construction."""

    def __init__(
        self, state: RunState, folder: RunFolder, tracked: TrackedRun, every: int, warn: Callable[[str], None]
    ) -> None:
        self.state, self.folder, self.tracked, self.every, self.warn = state, folder, tracked, every, warn
        self._collapse = CollapseRule(state.length.batch_size // distributed.world_size())
        self.rate: float | None = None
        """Samples per second over all ranks, of the steps of the last row."""
        self._paused = self._waiting = 0.0
        self._step, self._row = state.step, (self._time(), 0.0)  # of the last row: when its step ended; seconds waited
        self._ended = self._row  # the same of the last step that is counted
        self._stage, self._schedules = state.stage, state.recipe.of_stage(state.stage).schedules()
        self._looked_stage, self._utilization = state.stage, self._utilization_of_stage()

    def add(self, result: StepResult, progress: Progress) -> None:
        """Call for each step, as the last that `state` counts, on every rank, with the `progress` that it used."""
        state, length = self.state, self.state.length
        if not progress.is_logged(self.every):
            return
        elapsed, waited = (now - before for now, before in zip(self._ended, self._row, strict=True))
        steps = state.step - self._step
        self.rate = steps * length.batch_size / elapsed
        state.seconds += elapsed
        self.write(result, progress, self.rate, self._timing(elapsed / steps, waited / steps))
        self._step, self._row = state.step, self._ended

    def step_ended(self) -> None:
        """Call when a step is counted: its row is written later."""
        self._ended = self._time(), self._waiting

    def _time(self) -> float:
        return time.perf_counter() - self._paused

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the wait for a step's batch."""
        start = time.perf_counter()
        yield
        self._waiting += time.perf_counter() - start

    def look(self, batch: Batch) -> None:
        """At a batch on the host, whose step counts once a stage for `mfu`."""
        if self._looked_stage != self.state.stage:
            self._looked_stage, self._utilization = self.state.stage, self._utilization_of_stage()
        with self.paused():
            self._utilization.look(batch, self.state.seconds)

    def _utilization_of_stage(self) -> Utilization:
        return Utilization(self.state.recipe.of_stage(self.state.stage), self.state.device, self.warn)

    def _timing(self, step_s: float, data_wait_s: float) -> dict[str, float]:
        """Of the mean step since the last row, on the first rank."""
        timing = {"step_s": round(step_s, 5), "data_wait_s": round(data_wait_s, 5)}
        if (memory := peak_memory(self.state.device)) is not None:
            timing["peak_memory_gb"] = round(memory / 1e9, 3)
        if (share := self._utilization.share(step_s)) is not None:
            timing["mfu"] = round(share, 4)
        return timing

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time spent inside this context from the training time."""
        start = time.perf_counter()
        yield
        self._paused += time.perf_counter() - start

    def write(self, result: StepResult, progress: Progress, rate: float, timing: dict[str, float]) -> None:
        """Write a row. Each rank's losses cover its own samples; the row has the means over ranks."""
        state = self.state
        means = iter(distributed.mean([result.loss, *result.terms.values(), *result.metrics.values()]))
        if distributed.rank() > 0:
            return
        loss, terms = next(means), {name: next(means) for name in result.terms}
        metrics = {name: next(means) for name in result.metrics}
        row: dict[str, Any] = {
            "step": state.step,
            "epoch": round(state.length.epoch(state.step), 4),
            "loss": loss,
            "terms": terms,
            "metrics": metrics,
            "lr": result.lr,
            "grad_norm": result.norm,
            "samples_per_s": round(rate, 2),
            "seconds": round(state.seconds, 3),
            "timing": timing,
        }
        for id, teacher in state.objective.teachers.items():
            prefix = "" if id == DEFAULT_TEACHER else f"teacher/{id}/"
            row |= {prefix + name: value for name, value in teacher.metrics(progress).items()}
        if state.stage != self._stage:
            self._stage, self._schedules = state.stage, state.recipe.of_stage(state.stage).schedules()
        if self._schedules:
            row["schedules"] = {path: option.value(progress) for path, option in self._schedules.items()}
        self.folder.log(row)
        self.tracked.log(state.step, row)
        if line := self._collapse.check(metrics):
            self.warn(f"step {state.step}: {line}")
