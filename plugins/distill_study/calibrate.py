"""A budget of seconds: time each variant for a few steps, and give it the steps that fit.

So every run knows its number of steps before it starts: its schedules go to their end, and it can be resumed and
repeated exactly. A clock in the trainer could promise neither. The price is that runs are as long as the budget only
as far as the machine is as fast as it was while they were timed; the table has the seconds that they took.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from distill_core import UserError, write_whole
from distill_core.tools import Recipe, Registry, RunFolder, run_recipe
from distill_study.compare import differences
from distill_study.launch import in_use, read_memory, state
from distill_study.plan import Run, StudyPlan, method, with_steps


def _memory(folder: Path) -> Path:
    return folder / "calibration.json"


def _mark(recipe: Recipe) -> str:
    """What a time belongs to: the recipe, whatever its length."""
    return hashlib.sha256(json.dumps(method(with_steps(recipe, 1)), sort_keys=True).encode()).hexdigest()[:16]


def calibration_runs(plan: StudyPlan, folder: Path) -> list[Run]:
    """A short run, with the first seed, of each variant that was not timed yet: nothing evaluated, nothing tracked."""
    assert plan.study.budget is not None
    known = read_memory(_memory(folder))
    runs = []
    for variant in plan.variants:
        recipe = plan.recipes[variant.name]
        if known.get(variant.name, {}).get("recipe") == _mark(recipe):
            continue
        short = with_steps(recipe, plan.study.budget.calibrate)
        checkpoint = short.train.checkpoint.model_copy(update={"every": None, "best": None})
        short = short.model_copy(
            update={
                "name": variant.name,
                "seed": plan.study.seeds[0],
                "train": short.train.model_copy(update={"log_every": 1, "checkpoint": checkpoint}),
                "evaluate": short.evaluate.model_copy(update={"every": None, "tasks": []}),
                "tracking": None,
            }
        )
        runs.append(Run(variant.name, variant, plan.study.seeds[0], short))
    return runs


def drop_changed(runs: Sequence[Run], folder: Path, registry: Registry) -> None:
    """Remove calibrations in `folder` that were interrupted and are of another recipe than is to be timed now."""
    for run in runs:
        place = folder / run.name
        if state(place) == "new" or in_use(place):
            continue
        try:
            same = not differences([run_recipe(place, registry), run.recipe])
        except UserError:  # it has what is not there any more
            same = False
        if not same:
            shutil.rmtree(place)


def keep_times(plan: StudyPlan, folder: Path, runs: Sequence[Run]) -> None:
    """Write down the seconds a step took in the later half of each calibration, and drop the calibration's runs."""
    known = read_memory(_memory(folder))
    for run in runs:
        rows = [row for row in RunFolder(folder / "calibration" / run.name).rows() if "terms" in row]
        half, end = rows[len(rows) // 2 - 1], rows[-1]
        steps = end["step"] - half["step"]
        per_step = (end["seconds"] - half["seconds"]) / steps
        known[run.name] = {"seconds_per_step": per_step, "steps": steps, "recipe": _mark(plan.recipes[run.name])}
        shutil.rmtree(folder / "calibration" / run.name)
    write_whole(_memory(folder), json.dumps(known, indent=1))


def calibrated_steps(plan: StudyPlan, folder: Path) -> dict[str, int]:
    """Variant -> the steps that fit in the budget. Raises `UserError` where not even one does."""
    budget = plan.study.budget
    assert budget is not None
    assert budget.seconds is not None
    known = read_memory(_memory(folder))
    steps = {}
    for variant in plan.variants:
        per_step = known[variant.name]["seconds_per_step"]
        steps[variant.name] = int(budget.seconds / per_step)
        if steps[variant.name] < 1:
            raise UserError(
                f"{plan.study.where('budget')}: budget.seconds: a step of variant {variant.name!r} takes "
                f"{per_step:.3g} s; give it more than {budget.seconds:g} s"
            )
    return steps
