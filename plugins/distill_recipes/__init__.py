"""The recipes that come with distill, by name: those of the folder `recipes` of the repository."""

from __future__ import annotations

from pathlib import Path

from distill_core import hookimpl

distill_api = 2


@hookimpl
def distill_recipes() -> list[Path]:
    """A wheel has the folder in this package; an editable install reads the repository's."""
    packaged = Path(__file__).with_name("recipes")
    return [packaged if packaged.is_dir() else Path(__file__).parents[2] / "recipes"]
