"""Runs a recipe's evaluation tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from distill_core import distributed
from distill_core.components import DataSource
from distill_core.data.shards import check
from distill_core.errors import UserError
from distill_core.evaluate.sets import EvaluationSet
from distill_core.media import Media
from distill_core.model import Model
from distill_core.recipe import Recipe
from distill_core.types import Skipped


@dataclass
class Evaluated:
    """`scores` by `SIDE/TASK/...`, one line for each task that failed, and the samples that could not be read."""

    scores: dict[str, float] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    media: list[Media] = field(default_factory=list)
    no_media: Exception | None = None
    """Why there are no (more) pictures, where a task could not make them: scores do not suffer from it."""


def evaluate(
    recipe: Recipe,
    models: Mapping[str, Model],
    source: DataSource,
    split: str,
    progress: Callable[[str], None] = lambda what: None,
    media: int = 0,
) -> Evaluated:
    """Score every model on every task. A task that cannot be run fails by itself; the others keep their scores.

    `media` asks each task for pictures of about so many samples.
    """
    result = Evaluated()
    if not recipe.tasks:
        return result
    found, problem = _found(source, split)
    # a rank whose shards are missing must not leave the others waiting for it
    problems = distributed.gather_objects(problem)
    if any(problems):
        result.failed += dict.fromkeys(line for line in problems if line)
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
            if media and result.no_media is None:
                try:
                    with _alone(sets):
                        made = list(task.media(model, sets, media))
                except Exception as error:
                    result.no_media = error
                    continue
                result.media += [
                    replace(item, name=f"{node.id}/{item.name}", context={"model": side, **item.context})
                    for item in made
                ]
    result.skipped = [skipped for samples in sets for skipped in samples.skipped.values()]
    return result


def _found(source: DataSource, split: str) -> tuple[dict[str, list[str]], str | None]:
    """The split's shards by set, or why this rank has none."""
    try:
        found = {name: list(shards) for name, shards in source.sets(split).items()}
        for shards in found.values():
            check(shards)
    except UserError as error:
        return {}, str(error)
    return found, None if found else f"the data source has no split {split!r}"


@contextmanager
def _alone(sets: Sequence[EvaluationSet]) -> Iterator[None]:
    """While one rank works and the others do not."""
    for samples in sets:
        samples.alone = True
    try:
        yield
    finally:
        for samples in sets:
            samples.alone = False
