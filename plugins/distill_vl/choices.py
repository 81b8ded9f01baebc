"""Which backend each op of a recipe takes on a device, and at which shapes: asked of a step without values."""

from __future__ import annotations

from contextlib import nullcontext

import torch

from distill_core import CopiedTeacher, Progress, UserError
from distill_core.tools import Recipe, WithoutValues, build_objective, example_batch, set_matmul_precision
from distill_kernels.choices import Choice, called, recorded
from distill_kernels.dispatch import Inputs


def choices_of(recipe: Recipe, device: torch.device) -> list[Choice]:
    """Of one step's forward pass (gradients are asked for) on `device`, in order; of each stage of the recipe one.

    A GPU need not be there: an H100 is assumed. The batch is the recipe's, of example samples
    (`example_batch`); modules and batch have no values, so that the step takes neither time nor memory.

    Raises:
        UserError: a component whose forward pass reads the values of its tensors; a teacher with weights of its own.
    """
    with recorded(device) as choices:
        _steps(recipe)
    return choices


def calls_of(recipe: Recipe) -> list[tuple[str, Inputs]]:
    """What `tune` times for a recipe: each op that such a step calls, or might with other backends, with inputs of each
    shape class. Raises as `choices_of` does."""
    with called() as calls:
        _steps(recipe)
    return [(op, inputs) for (op, _), inputs in calls.items()]


def _steps(recipe: Recipe) -> None:
    for number in range(1 + len(recipe.stages)):
        _step(recipe.of_stage(number))


def _step(recipe: Recipe) -> None:
    for name, teacher in recipe.all_teachers.items():
        if not issubclass(teacher.cls, CopiedTeacher):
            raise UserError(
                f"{recipe.name}: the teacher {name!r} is {teacher.cls.name!r}: only teachers that follow the student "
                "are part of such a step; take an `ema` of towers like its own in its place"
            )
    without = WithoutValues()
    objective = without.build(lambda: build_objective(recipe))
    batch = example_batch(recipe, recipe.data.batch_size)
    batch.views = {name: views.map(without.convert) for name, views in batch.views.items()}
    tf32 = torch.backends.cuda.matmul.allow_tf32
    bf16 = torch.autocast("cpu", torch.bfloat16) if recipe.train.precision == "bf16" else nullcontext()
    set_matmul_precision(recipe.train.matmul_precision)
    try:
        with without, bf16:
            objective.losses(objective.represent(batch, Progress(0, 1)))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32
