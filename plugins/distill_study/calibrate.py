"""A budget of seconds: time each variant for a few steps, then give it the number of steps that fits.

So every run knows its number of steps before it starts: its schedules complete, and it can be resumed and repeated
exactly, which a time limit in the trainer could not guarantee. The price is that a run takes as long as the budget only
if the machine is as fast as during the timing; the table has the seconds that the runs took.
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


def _times_file(folder: Path) -> Path:
    return folder / "calibration.json"


def _fingerprint(recipe: Recipe) -> str:
    """Identifies the recipe that a time was measured with, apart from its length."""
    return hashlib.sha256(json.dumps(method(with_steps(recipe, 1)), sort_keys=True).encode()).hexdigest()[:16]


def calibration_runs(plan: StudyPlan, folder: Path) -> list[Run]:
    """A short run, with the first seed, of each variant that is not timed yet, without evaluation and tracking."""
    assert plan.study.budget is not None
    times = read_memory(_times_file(folder))
    runs = []
    for variant in plan.variants:
        recipe = plan.recipes[variant.name]
        if times.get(variant.name, {}).get("recipe") == _fingerprint(recipe):
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
    """Remove interrupted calibrations in `folder` whose recipe differs from the one to be timed now."""
    for run in runs:
        place = folder / run.name
        if state(place) == "new" or in_use(place):
            continue
        try:
            is_unchanged = not differences([run_recipe(place, registry), run.recipe])
        except UserError:  # it names a component that no longer exists
            is_unchanged = False
        if not is_unchanged:
            shutil.rmtree(place)


def keep_times(plan: StudyPlan, folder: Path, runs: Sequence[Run]) -> None:
    """Store the seconds per step in the second half of each calibration, and delete the calibration's runs."""
    times = read_memory(_times_file(folder))
    for run in runs:
        rows = [row for row in RunFolder(folder / "calibration" / run.name).rows() if "terms" in row]
        middle, end = rows[len(rows) // 2 - 1], rows[-1]
        steps = end["step"] - middle["step"]
        per_step = (end["seconds"] - middle["seconds"]) / steps
        times[run.name] = {"seconds_per_step": per_step, "steps": steps, "recipe": _fingerprint(plan.recipes[run.name])}
        shutil.rmtree(folder / "calibration" / run.name)
    write_whole(_times_file(folder), json.dumps(times, indent=1))


def calibrated_steps(plan: StudyPlan, folder: Path) -> dict[str, int]:
    """Variant -> the steps that fit in the budget. Raises `UserError` where not even one does."""
    budget = plan.study.budget
    assert budget is not None
    assert budget.seconds is not None
    times = read_memory(_times_file(folder))
    steps = {}
    for variant in plan.variants:
        per_step = times[variant.name]["seconds_per_step"]
        steps[variant.name] = int(budget.seconds / per_step)
        if steps[variant.name] < 1:
            raise UserError(
                f"{plan.study.where('budget')}: budget.seconds: a step of variant {variant.name!r} takes "
                f"{per_step:.3g} s; give it more than {budget.seconds:g} s"
            )
    return steps
