"""The recipe of runs of six steps, which save every second one and score nothing."""

from __future__ import annotations

from distill_core.recipe.resolve import parse_recipe
from distill_core.recipe.sections import Recipe
from distill_core.registry import Registry


def parse(text: str, registry: Registry, *overrides: str) -> Recipe:
    """`text` is that of the fixture `small_text`."""
    plain = ["evaluate=null", "train.checkpoint={every: 2, keep: 9}", "train.steps=6"]
    return parse_recipe(text, "small.yaml", registry=registry, overrides=[*plain, *overrides])
