"""`distill profile`: a few real steps of a recipe, their time by part, and a trace."""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, record_function

from distill_core import progress_bar, rank
from distill_core.tools import Recipe, Uploads, assemble, prepare_process

TRACED = 2
"""Steps in the trace."""


@dataclass(frozen=True)
class Profile:
    """Of this rank."""

    device: str
    batch_size: int
    """Samples on this rank."""
    parts: dict[str, float]
    """Mean seconds of a step by part, in the step's order."""
    step: float
    """Mean seconds of a whole step; of which the parts may leave something over."""
    trace: str | None


class Parts:
    """Seconds by part. On a GPU each part is waited for, at both ends, while `waits`; in a trace they have names."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.waits = device, True
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self._open: tuple[str, float, Any] | None = None

    def now(self) -> float:
        """Seconds, from no particular moment."""
        if self.waits and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def begin(self, name: str) -> None:
        """A part, in which no other begins before it ends."""
        mark = record_function(name)
        mark.__enter__()  # type: ignore[no-untyped-call]
        self._open = name, self.now(), mark

    def end(self) -> None:
        """The part that has begun, if one has."""
        if self._open is not None:
            name, began, mark = self._open
            self._open = None
            self.seconds[name].append(self.now() - began)
            mark.__exit__(None, None, None)

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """The block is this part."""
        self.begin(name)
        yield
        self.end()

    def timed(self, name: str, function: Callable[..., Any], then: str | None = None) -> Callable[..., Any]:
        """The function as a part: it ends what has begun, and begins `then` when it returns."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            self.end()
            with self.of(name):
                result = function(*args, **kwargs)
            if then is not None:
                self.begin(then)
            return result

        return call


def profile(recipe: Recipe, *, steps: int, warmup: int, trace: Path | None, quiet: bool = False) -> Profile:
    """Train for `warmup` steps, `steps` that are timed, and two that are traced. Nothing is saved but the trace.

    Raises `UserError` and `DataError` as training does.
    """
    device = prepare_process(recipe)
    source = recipe.data.source.build()
    source.prepare()
    state = assemble(recipe, source, device, resuming=False, quiet=quiet).state
    parts, upload = Parts(device), Uploads(device)
    objective, train_step = state.objective, state.train_step
    objective.on_device = parts.timed("views on the device", objective.on_device)  # type: ignore[method-assign]
    objective.represent_teachers = parts.timed("teacher", objective.represent_teachers)  # type: ignore[method-assign]
    objective.represent_student = _by_modality(parts, objective.represent_student)  # type: ignore[method-assign]
    objective.fuse = parts.timed("fusion", objective.fuse)  # type: ignore[method-assign]
    objective.losses = parts.timed("losses", objective.losses, then="backward")  # type: ignore[method-assign]
    objective.before_optimizer = parts.timed("EMA", objective.before_optimizer)  # type: ignore[method-assign]
    objective.after_step = parts.timed("EMA", objective.after_step)  # type: ignore[method-assign]
    optimizer: Any = train_step.optimizer
    optimizer.step = parts.timed("optimizer", optimizer.step)

    def run_step() -> float:
        began = parts.now()
        with parts.of("data wait"):
            batch = None
            while batch is None:
                batch = state.loader.wait(1.0)
        with parts.of("upload"):
            batch = upload(batch)
        train_step(batch, state.length.progress(state.step))
        state.step += 1
        return parts.now() - began

    traced = TRACED if trace is not None else 0
    state.start()
    try:
        with progress_bar(warmup + steps + traced, "steps are run", quiet=quiet) as advance:
            for _ in range(warmup):
                run_step()
                advance()
            parts.seconds.clear()
            whole = []
            for _ in range(steps):
                whole.append(run_step())
                advance()
            means = {name: sum(seconds) / steps for name, seconds in parts.seconds.items()}
            parts.waits = False
            with _traced(device, trace if rank() == 0 else None):
                for _ in range(traced):
                    run_step()
                    advance()
    finally:
        state.loader.close()
    return Profile(str(device), recipe.data.batch_size, means, sum(whole) / steps, str(trace) if trace else None)


def _by_modality(parts: Parts, represent: Callable[..., Any]) -> Callable[..., Any]:
    def call(batch: Any, modality: str) -> Any:
        return parts.timed(f"{modality} tower", represent)(batch, modality)

    return call


@contextmanager
def _traced(device: torch.device, path: Path | None) -> Iterator[None]:
    """The block, written to `path` for chrome://tracing or Perfetto."""
    if path is None:
        yield
        return
    cuda = [ProfilerActivity.CUDA] if device.type == "cuda" else []
    with torch.profiler.profile(activities=[ProfilerActivity.CPU, *cuda]) as profiler:
        yield
        if cuda:
            torch.cuda.synchronize(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))
