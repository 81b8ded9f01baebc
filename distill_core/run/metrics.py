"""The training rows of metrics.jsonl, and the speed computed from them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from distill_core.collapse import CollapseRule
from distill_core.outputs import Progress
from distill_core.run.folder import RunFolder
from distill_core.run.state import RunState
from distill_core.run.tracking import TrackedRun
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
        self._clock, self._step = time.perf_counter(), state.step  # of the last row
        self._stage, self._schedules = state.stage, state.recipe.of_stage(state.stage).schedules()

    def add(self, result: StepResult, progress: Progress) -> None:
        """Call for each step, as the last that `state` counts, on every rank, with the `progress` that it used."""
        state, length = self.state, self.state.length
        if not progress.is_logged(self.every):
            return
        elapsed = time.perf_counter() - self._clock
        self.rate = (state.step - self._step) * length.batch_size / elapsed
        state.seconds += elapsed
        self.write(result, progress, self.rate)
        self._clock, self._step = time.perf_counter(), state.step

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time spent inside this context from the training time."""
        start = time.perf_counter()
        yield
        self._clock += time.perf_counter() - start

    def write(self, result: StepResult, progress: Progress, rate: float) -> None:
        """Write a row. Each rank's losses cover its own samples; the row has the means over ranks."""
        state = self.state
        means = iter(distributed.mean([result.loss, *result.terms.values(), *result.metrics.values()]))
        if distributed.rank() > 0:
            return
        epoch, teacher = state.length.epoch(state.step), state.objective.teacher
        loss, terms = next(means), {name: next(means) for name in result.terms}
        metrics = {name: next(means) for name in result.metrics}
        row: dict[str, Any] = {
            "step": state.step,
            "epoch": round(epoch, 4) if epoch is not None else None,
            "loss": loss,
            "terms": terms,
            "metrics": metrics,
            "lr": result.lr,
            "grad_norm": result.norm,
            "samples_per_s": round(rate, 2),
            "seconds": round(state.seconds, 3),
        }
        if teacher is not None:
            row["momentum"] = teacher.momentum(progress)
        if state.stage != self._stage:
            self._stage, self._schedules = state.stage, state.recipe.of_stage(state.stage).schedules()
        if self._schedules:
            row["schedules"] = {path: option.value(progress) for path, option in self._schedules.items()}
        self.folder.log(row)
        self.tracked.log(state.step, row)
        if line := self._collapse.check(metrics):
            self.warn(f"step {state.step}: {line}")
