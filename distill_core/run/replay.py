"""Runs one step of a run again, and looks closely at it: the same batch, views and random numbers, from the nearest
checkpoint before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from distill_core.batch import Batch
from distill_core.errors import UserError
from distill_core.recipe.sections import Recipe
from distill_core.run.assembly import assemble, prepare_process
from distill_core.run.capture import Capture, read_capture
from distill_core.run.checkpoint import Checkpoints
from distill_core.run.folder import RunFolder
from distill_core.run.inspection import Inspection
from distill_core.run.stages import due, enter, load
from distill_core.run.state import Length, RunState
from distill_core.step import StepResult
from distill_core.system import distributed
from distill_core.system.process import set_random
from distill_core.system.progress import progress_bar
from distill_core.system.transfer import Uploads


@dataclass(frozen=True)
class Replay:
    """A step that was run again. `loss`, `terms` and `metrics` are means over ranks, as in metrics.jsonl."""

    step: int
    start: int
    """The step of the checkpoint that it started from; 0 for the run's beginning."""
    loss: float
    terms: Mapping[str, float]
    metrics: Mapping[str, float]
    grad_norm: float
    keys: Sequence[str]
    """Of all ranks' samples."""
    logged: float | None
    """The loss that metrics.jsonl has of it; None where it has no row."""
    captured: bool
    """Whether the run noted this step as not finite."""
    first_bad: str | None = None
    """The first tensor that was not finite, in words."""
    bad_gradients: Sequence[str] = ()
    """Parameters whose gradient was not finite, in the order in which the backward pass came to them."""
    contributions: Mapping[str, float] = field(default_factory=dict)
    """Sample key -> B L - (B - 1) L', of the loss L and that without the sample, L': its own loss, where the loss is a
    mean over samples."""
    no_contributions: str = ""
    """Why there are none."""
    culprits: Sequence[str] = ()
    """Samples without any of which the loss is finite."""


def replay_step(recipe: Recipe, folder: RunFolder, step: int, *, quiet: bool = False) -> Replay:
    """Run step `step` (from 1, as in metrics.jsonl) again. The folder is only read.

    A step that the run has captured as not finite is that one, though a resumed run has another of its number. Raises
    `UserError` where the run has no such step.
    """
    if not step >= 1:
        raise UserError("--step counts from 1, as metrics.jsonl does")
    eager = recipe.train.parallel.model_copy(update={"compile": False})  # hooks need the modules as they are written
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"parallel": eager})})
    capture = read_capture(folder.path, step)
    device = prepare_process(recipe)
    checkpoints = Checkpoints(folder.path)
    earlier = [saved for saved in checkpoints.steps() if saved < step]
    source = recipe.data.source.build()
    source.prepare()
    state = assemble(recipe, source, device, resuming=bool(earlier), quiet=quiet).state
    if earlier:
        checkpoint = distributed.raise_on_all_ranks(lambda: checkpoints.load(str(earlier[-1])))
        load(state, checkpoint.state, str(folder.path))
    elif (batch_size := _batch_size(capture, checkpoints)) is not None:
        state.loader.load_state_dict(state.loader.state_dict() | {"batch_size": batch_size})
        state.length = Length.of(recipe.train, batch_size, state.loader.samples)
    if step > state.length.steps:
        raise UserError(f"{folder.path}: a run of {state.length.steps} steps has no step {step}")
    start = state.step
    if capture is not None and start == step - 1:
        # the checkpoint of a run that stopped there is of the step before, but lies after this batch
        state.loader.position = capture.position
    state.start()
    try:
        if capture is not None and start == step - 1 and len(capture.random) == distributed.world_size():
            set_random(capture.random_of(distributed.rank()), device)
        with progress_bar(step - start, "steps are run", quiet=quiet) as advance:
            return _run(state, folder, step, start, capture, advance)
    finally:
        state.loader.close()


def _batch_size(capture: Capture | None, checkpoints: Checkpoints) -> int | None:
    """The run's, over all its ranks, which may be others than these; None where nothing says it."""
    if capture is not None:
        return len(capture.keys)
    if not checkpoints.steps():
        return None
    saved = distributed.raise_on_all_ranks(lambda: checkpoints.load().state)
    return int(saved["ranks"][0]["data"]["batch_size"])


def _run(state: RunState, folder: RunFolder, step: int, start: int, capture: Capture | None, advance: Any) -> Replay:
    upload = Uploads(state.device)
    while state.step < step - 1:
        batch = _next(state)
        train_step = state.train_step
        result = train_step(upload(batch), state.length.progress(state.step))
        if result.not_finite < train_step.allowed:
            state.step += 1
            advance()
        else:  # the run ended here, and was resumed with the next batch for the same step
            train_step.not_finite.zero_()
    batch = _next(state)
    inspection = Inspection(state.objective, batch, alone=distributed.world_size() == 1)
    with inspection:
        result = state.train_step(upload(batch), state.length.progress(state.step))
    advance()
    return _replay(result, batch, inspection, folder, step, start, capture)


def _replay(
    result: StepResult,
    batch: Batch,
    inspection: Inspection,
    folder: RunFolder,
    step: int,
    start: int,
    capture: Capture | None,
) -> Replay:
    loss, *rest = distributed.mean([result.loss, *result.terms.values(), *result.metrics.values()])
    count = len(result.terms)
    keys = [key for of_rank in distributed.gather_objects(batch.keys) for key in of_rank]
    if capture is not None and keys != capture.keys:
        raise UserError(
            f"{folder.path}: step {step} has other samples than the run noted ({keys[0]}, ..., not "
            f"{capture.keys[0]}, ...): has the data or the recipe changed since?"
        )
    of_ranks = distributed.gather_objects((inspection.first_bad, inspection.bad_gradients))
    who = [f"rank {rank}: " if len(of_ranks) > 1 else "" for rank in range(len(of_ranks))]
    rows = [row for row in folder.rows() if row["step"] == step and "terms" in row]
    return Replay(
        step=step,
        start=start,
        loss=loss,
        terms=dict(zip(result.terms, rest[:count], strict=True)),
        metrics=dict(zip(result.metrics, rest[count:], strict=True)),
        grad_norm=result.norm,
        keys=keys,
        logged=rows[-1]["loss"] if rows and capture is None else None,
        captured=capture is not None,
        first_bad=next((f"{of}{bad}" for of, (bad, _) in zip(who, of_ranks, strict=True) if bad is not None), None),
        bad_gradients=list(dict.fromkeys(name for _, names in of_ranks for name in names)),
        contributions=dict(zip(batch.keys, inspection.contributions, strict=False)),
        no_contributions=inspection.no_contributions,
        culprits=[batch.keys[i] for i in inspection.culprits],
    )


def _next(state: RunState) -> Batch:
    if (stage := due(state)) != state.stage:
        enter(state, stage)
    while (batch := state.loader.wait(1.0)) is None:
        pass
    return batch
