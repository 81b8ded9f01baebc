"""All recipes of a study, checked before the first run starts: every error at once, with the variant's name."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from distill_core import did_you_mean
from distill_core.tools import Override, Recipe, RecipeErrors, Registry, load_recipe, parse_address
from distill_study.grammar import Study, Variant

RUN_OPTIONS = ("name", "seed", "tags")
"""Options that identify a run, and do not affect how it trains."""


@dataclass(frozen=True)
class Run:
    """One variant with one seed; `name` is its folder's."""

    name: str
    variant: Variant
    seed: int
    recipe: Recipe


@dataclass
class StudyPlan:
    """A study whose recipes are valid. Without a budget of seconds their numbers of steps are final."""

    study: Study
    variants: tuple[Variant, ...]
    recipes: dict[str, Recipe]
    warnings: list[str] = field(default_factory=list)

    def runs(self, steps: Mapping[str, int] | None = None) -> list[Run]:
        """Seed by seed, so that all variants can be compared early. `steps` come from the calibration."""
        runs = []
        for seed in self.study.seeds:
            for variant in self.variants:
                recipe = self.recipes[variant.name]
                if steps is not None:
                    recipe = with_steps(recipe, steps[variant.name])
                name = f"{variant.name}-seed{seed}"
                tags = {**recipe.tags, "study": self.study.name, "variant": variant.name, "seed": seed}
                run_recipe = recipe.model_copy(update={"name": name, "seed": seed, "tags": tags})
                runs.append(Run(name, variant, seed, run_recipe))
        return runs


def with_steps(recipe: Recipe, steps: int) -> Recipe:
    """The recipe with another length."""
    train = recipe.train.model_copy(update={"steps": steps, "epochs": None})
    return recipe.model_copy(update={"train": train})


def method(recipe: Recipe) -> dict[str, Any]:
    """The resolved recipe without its name, seed and tags."""
    return {key: value for key, value in recipe.to_dict().items() if key not in RUN_OPTIONS}


def check_study(study: Study, registry: Registry, *, allow_unset: bool = False) -> StudyPlan:
    """Read and check every variant's recipe. Raises `RecipeErrors` with the errors of all of them.

    `allow_unset` turns unset `${NAME}` into warnings.
    """
    recipes: dict[str, Recipe] = {}
    variants_by_error: dict[str, list[Variant]] = {}
    warnings: dict[str, None] = {}
    for variant in study.variants:
        try:
            recipe = load_recipe(
                variant.recipe,
                registry=registry,
                overrides=[*study.shared, *variant.changes, *_length(study)],
                allow_unset=allow_unset,
            )
        except RecipeErrors as error:
            for line in error.lines:
                variants_by_error.setdefault(line, []).append(variant)
            continue
        warnings |= dict.fromkeys(recipe.warnings)
        if study.budget is not None and study.budget.samples is not None:
            recipe = with_steps(recipe, max(1, round(study.budget.samples / recipe.data.batch_size)))
        recipes[variant.name] = recipe
    errors = [_with_variants(study, line, variants) for line, variants in variants_by_error.items()]
    errors += _unknown_scores(study, recipes) if not variants_by_error else []
    variants, notes = _distinct(study, recipes, errors)
    if errors:
        raise RecipeErrors(errors)
    notes += _unmatched(study, [recipes[variant.name] for variant in variants])
    return StudyPlan(study, variants, recipes, [*warnings, *notes])


def _length(study: Study) -> list[Override]:
    if study.budget is None:
        return []
    steps = study.budget.steps or 1  # replaced later by the number that samples or seconds give
    return [(f"train.steps={steps}", study.where("budget"))]


def _with_variants(study: Study, line: str, variants: Sequence[Variant]) -> str:
    """The error with the names of the variants that have it, after its place in the study file, if it has one."""
    names = [repr(variant.name) for variant in variants]
    if len(names) == len(study.variants) > 1:
        who = "all variants"
    else:
        ellipsis = f" and {len(names) - 3} more" if len(names) > 3 else ""
        who = f"variant{'s' if len(names) > 1 else ''} {', '.join(names[:3])}{ellipsis}"
    for variant in variants:
        for origin in (variant.origin, *(origin for _, origin in (*variant.changes, *study.shared))):
            if line.startswith(f"{origin}: "):
                return f"{origin}: {who}: {line.removeprefix(f'{origin}: ')}"
    return f"{variants[0].origin}: {who}: {line}"


def _distinct(study: Study, recipes: Mapping[str, Recipe], errors: list[str]) -> tuple[tuple[Variant, ...], list[str]]:
    """The variants without duplicates. A duplicate is an error, unless a swap is the recipe's own value."""
    distinct: dict[str, Variant] = {}
    notes = []
    for variant in study.variants:
        if variant.name not in recipes:
            continue
        first = distinct.setdefault(json.dumps(method(recipes[variant.name]), sort_keys=True), variant)
        if first is variant:
            continue
        if study.one_at_a_time and first is study.variants[0] and variant.name != study.base:
            notes.append(f"{variant.label!r} is the unchanged recipe; it is not run a second time")
        else:
            errors.append(f"{variant.origin}: variant {variant.name!r}: the same recipe as variant {first.name!r}")
    return tuple(distinct.values()), notes


def _unknown_scores(study: Study, recipes: Mapping[str, Recipe]) -> list[str]:
    """Errors for scores that no variant's tasks have, judged by their names."""
    tasks = sorted({node.id for recipe in recipes.values() for node in recipe.evaluate.tasks})
    sides = ["student", "teacher"] if any(recipe.teacher for recipe in recipes.values()) else ["student"]
    errors = []
    for i, score in enumerate(study.scores):
        where = f"{study.where('scores', i)}: scores.{i}"
        try:
            side, task, _ = parse_address(score)
        except ValueError:
            side = ""
        if side not in sides:
            errors.append(f"{where}: a score is SIDE/TASK/NAME with {' or '.join(sides)} as side, got {score!r}")
        elif task not in tasks:
            errors.append(f"{where}: no variant has a task {task!r}{did_you_mean(task, tasks)}")
    return errors


def _unmatched(study: Study, recipes: Sequence[Recipe]) -> list[str]:
    """A warning where the lengths differ and no budget was given."""
    lengths = {(recipe.train.steps, recipe.train.epochs, recipe.data.batch_size) for recipe in recipes}
    if study.budget is not None or len(lengths) < 2:
        return []
    return ["the variants differ in steps, epochs or batch size, and there is no `budget` to match them"]
