"""Resuming a run from one of its checkpoints, under a recipe that may have changed since, in a folder that may hold
later steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from distill_core.errors import RecipeErrors, UserError
from distill_core.recipe.changes import changes
from distill_core.run.checkpoint import Checkpoint, Checkpoints
from distill_core.run.display import Display
from distill_core.run.folder import RunFolder
from distill_core.run.stages import load
from distill_core.run.state import Resumed, RunState
from distill_core.system import distributed

FIXED = {
    "seed": "the order of the samples would change within a pass",
    "data.batch_size": "its steps, schedule and passes are counted in batches of that size",
    "data.shuffle": "the order of the samples would change within a pass",
    "data.weights": "the order of the samples would change within a pass",
    "data.batches": "the order of the samples would change within a pass",
    "data.streams": "the order of the samples would change within a pass",
    "train.optimizer.name": "its state is not the other's",
    "train.lr_factors": "the optimiser's state is grouped by factor",
    "train.lr_decay": "the optimiser's state is grouped by factor",
    "freeze": "the optimiser has state for the trained parameters only",
    "weights": "the run has already started from other weights",
}
"""Options that cannot change once a run has begun, and why."""


def resume_run(state: RunState, folder: RunFolder, checkpoints: Checkpoints, which: str, display: Display) -> None:
    """Load a checkpoint into `state`, and set aside what the folder holds of later steps.

    Raises `UserError` for a checkpoint that cannot be read or does not fit, `RecipeErrors` for a change of what is
    `FIXED`.
    """
    # the first rank reads and checks it all, each of the others its own part of that very one
    first = distributed.raise_on_all_ranks(
        lambda: checkpoints.load(which, display.warn) if distributed.rank() == 0 else None
    )
    file, digest = distributed.gather_objects(first and (first.path, first.digest))[0]
    checkpoint = distributed.raise_on_all_ranks(lambda: first or checkpoints.reopen(file))
    if set(distributed.gather_objects(checkpoint.digest)) != {digest}:
        raise UserError(f"{file}: is not the same file on all ranks; run folders must be shared")
    saved = checkpoint.state
    changed = changes(saved["recipe"], state.recipe.to_dict())
    _refuse(changed, folder)
    load(state, saved, str(folder.path))
    if "train.checkpoint.best" in changed:
        state.best = None  # it was another score's
    # no rank may add to a file before it is rewound
    branch, state.best = distributed.on_first_rank(
        lambda: _rewind(checkpoint, state, folder, checkpoints, display.warn)
    )
    state.resumed = Resumed(changed, branch)


def _refuse(changed: Mapping[str, tuple[Any, Any]], folder: RunFolder) -> None:
    hint = f"Set it back, or start a new run: weights: [{{name: state_dict, source: {folder.path}}}]"
    errors = [
        f"{folder.path / 'recipe.yaml'}: {path} is {new}, and was {old} in the checkpoint: {why}. {hint}"
        for path, (old, new) in changed.items()
        for fixed, why in FIXED.items()
        if path == fixed or path.startswith(f"{fixed}.")
    ]
    if errors:
        raise RecipeErrors(errors)


def _rewind(
    checkpoint: Checkpoint, state: RunState, folder: RunFolder, checkpoints: Checkpoints, warn: Callable[[str], None]
) -> tuple[dict[str, Any] | None, float | None]:
    """Set aside later checkpoints and delete later rows, which training will write again; returns the branch, and the
    best score of it so far."""
    branch, best = None, state.best
    if later := checkpoints.later(state.step):
        folder_aside = folder.set_aside(later, state.step)
        checkpoints.restart_from(checkpoint)
        branch = {"step": state.step, "set_aside": str(folder_aside)}
        if checkpoints.best in later:
            best = None  # the next score is the best of this branch: its own was written over
        names = ", ".join(path.name for path in later)
        warn(f"going back to step {state.step}: {names} and their metrics and reports are set aside in {folder_aside}")
    folder.rewind(state.step, state.length.steps)
    return branch, best
