"""Runs a recipe's evaluation tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from distill_core.components import DataSource
from distill_core.data.shards import check
from distill_core.errors import UserError
from distill_core.evaluate.sets import EvaluationSet
from distill_core.model import Model
from distill_core.recipe import Recipe
from distill_core.types import Skipped


@dataclass
class Evaluated:
    """`scores` by `SIDE/TASK/...`, one line for each task that failed, and the samples that could not be read."""

    scores: dict[str, float] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)


def evaluate(
    recipe: Recipe,
    models: Mapping[str, Model],
    source: DataSource,
    split: str,
    progress: Callable[[str], None] = lambda what: None,
) -> Evaluated:
    """Score every model on every task. A task that cannot be run fails by itself; the others keep their scores."""
    result = Evaluated()
    if not recipe.tasks:
        return result
    try:
        found = source.sets(split)
        for shards in found.values():
            check(shards)
    except UserError as error:
        result.failed.append(str(error))
        return result
    if not found:
        result.failed.append(f"the data source has no split {split!r}")
        return result
    sets = [EvaluationSet(name, shards) for name, shards in found.items()]
    for node in recipe.tasks:
        task = node.build()
        for side, model in models.items():
            progress(f"{node.id} ({side}, {split})")
            try:
                scores = task.run(model, sets)
            except UserError as error:
                result.failed.append(f"{node.path} ({node.id}): {error}")
                break
            result.scores |= {f"{side}/{node.id}/{name}": value for name, value in scores.items()}
    result.skipped = [skipped for samples in sets for skipped in samples.skipped.values()]
    return result
