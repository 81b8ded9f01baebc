"""What a stage may change of a recipe: nothing that belongs to the whole run, and no weight's shape."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from distill_core.contracts.schedule import step_of
from distill_core.outputs import Progress
from distill_core.recipe.build import build_objective, without_memory
from distill_core.recipe.changes import changes
from distill_core.recipe.draft import Problem
from distill_core.recipe.sections import Recipe

MAY_CHANGE = (
    "augment", "backbone", "masker", "fusion", "fusions", "heads", "loss", "balance", "teacher", "teachers", "hooks",
    "freeze", "train.optimizer", "train.schedule", "train.lr_factors", "train.lr_decay", "train.clip_grad",
    "train.precision",
)  # fmt: skip


def stage_problems(recipe: Recipe, stages: Sequence[Recipe]) -> Iterator[Problem]:
    """Points that do not rise, and changes of what belongs to the whole run; `stages` are their whole recipes."""
    points = [_comparable(stage.at, recipe.train.steps) for stage in recipe.stages]
    for i, (before, after) in enumerate(pairwise(points), 1):
        if before[0] != after[0]:
            yield ("stages", i, "at"), "give all points as parts of the run, or all as steps (or give train.steps)"
        elif before[1] >= after[1]:
            yield ("stages", i, "at"), "comes no later than the stage before"
    for i, (old, new) in enumerate(pairwise([recipe, *stages])):
        for path in changes(old.to_dict() | {"stages": []}, new.to_dict()):
            allowed = any(path == part or path.startswith(f"{part}.") for part in MAY_CHANGE)
            if not allowed or path == "train.optimizer.name":
                line = f"{path} holds for the whole run; a stage may change {', '.join(MAY_CHANGE)}"
                yield ("stages", i), line


def unreached(recipe: Recipe) -> Iterator[str]:
    """A warning for each stage that begins when the run has ended."""
    steps = recipe.train.steps
    for i, stage in enumerate(recipe.stages):
        if steps is not None and step_of(stage.at, Progress(0, steps)) >= steps:
            yield f"stages.{i}: never begins: it is set to step {stage.at:g}, and the run ends after {steps}"


def _comparable(at: float, steps: int | None) -> tuple[str, float]:
    if steps is not None:
        return "steps", at * steps if at < 1 else at
    return ("part" if at < 1 else "steps"), at


def unfit_weights(recipe: Recipe, stages: Sequence[Recipe]) -> Iterator[Problem]:
    """Weights that would not fit, by the models themselves. Raises `NeedsMemory`."""
    shapes = [_shapes(one) for one in (recipe, *stages)] if stages else []
    for i, (old, new) in enumerate(pairwise(shapes)):
        for name, shape in old.items():
            if (other := new.get(name, shape)) != shape:
                yield ("stages", i), f"{name} would be {other} in place of {shape}, and a stage keeps the weights"


def _shapes(recipe: Recipe) -> dict[str, list[int]]:
    with without_memory():
        objective = build_objective(recipe)
    return {name: list(tensor.shape) for name, tensor in objective.state_dict().items()}
