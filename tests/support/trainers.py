"""Trainers of one test, which leave neither workers nor locked folders when it ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from distill_core.recipe.sections import Recipe
from distill_core.run.folder import RunFolder
from distill_core.train import Trainer


@contextmanager
def trainers(runs: Path) -> Iterator[Callable[[Recipe, Path | None], Trainer]]:
    """A trainer of a recipe in a new folder below `runs`, or of the run that it continues."""
    made: list[Trainer] = []

    def make(recipe: Recipe, resume: Path | None) -> Trainer:
        folder = RunFolder(resume) if resume is not None else RunFolder.create(runs, recipe)
        made.append(Trainer(recipe, folder, resume="last" if resume is not None else None, quiet=True))
        return made[-1]

    try:
        yield make
    finally:
        for trainer in made:
            trainer.loader.close()
            trainer.folder.unlock()
