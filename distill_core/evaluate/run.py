"""Runs a recipe's evaluation tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from distill_core.components import DataSource
from distill_core.data.shards import check
from distill_core.evaluate.sets import EvaluationSet
from distill_core.model import Model
from distill_core.recipe import Recipe


def evaluate(
    recipe: Recipe,
    models: Mapping[str, Model],
    source: DataSource,
    split: str,
    progress: Callable[[str], None] = lambda what: None,
) -> dict[str, float]:
    """Scores `SIDE/TASK/...` for every model and task; {} where the source has no such split.

    Raises `DataError` for missing shards, or a set without a usable sample.
    """
    found = source.sets(split)
    for shards in found.values():
        check(shards)
    if not found:
        return {}
    sets = [EvaluationSet(name, shards) for name, shards in found.items()]
    scores: dict[str, float] = {}
    for node in recipe.tasks:
        task = node.build()
        for side, model in models.items():
            progress(f"{node.id} ({side}, {split})")
            scores |= {f"{side}/{node.id}/{name}": value for name, value in task.run(model, sets).items()}
    return scores
