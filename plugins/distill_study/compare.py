"""Differences between recipes, and runs side by side."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from distill_core.tools import KeyPath, Recipe, RecipeErrors, Registry, run_recipe
from distill_study.grammar import label_of
from distill_study.plan import method
from distill_study.table import Group, RunResult, StudyTable, default_scores, unknown_scores

ABSENT = "-"


def differences(recipes: Sequence[Recipe]) -> dict[str, list[str]]:
    """path -> its value in each recipe, for the paths in which they differ; name, seed and tags are ignored.

    Components of a list go by their id (`loss.contrastive.weight`). Where two names differ in one place, the place
    itself is named, with the options that are not its defaults.
    """
    defaults = [_without_defaults(recipe) for recipe in recipes]
    return {".".join(path): values for path, values in _walk([method(recipe) for recipe in recipes], (), defaults)}


_MISSING = object()


def _walk(
    values: Sequence[Any], path: tuple[str, ...], short: Sequence[Mapping[tuple[str, ...], Any]]
) -> Iterator[tuple[tuple[str, ...], list[str]]]:
    if all(value == values[0] for value in values):
        return
    values = [_by_id(value) for value in values]
    names = [value.get("name") if isinstance(value, dict) else None for value in values]
    same_kind = len(set(names)) == 1 and all(isinstance(value, dict) for value in values)
    if not same_kind and not all(isinstance(value, dict) and "name" not in value for value in values):
        yield (
            path,
            [
                ABSENT if value is _MISSING else label_of(options.get(path, value))
                for value, options in zip(values, short, strict=True)
            ],
        )
        return
    for key in dict.fromkeys(key for value in values for key in value):
        yield from _walk([value.get(key, _MISSING) for value in values], (*path, key), short)


def _by_id(value: Any) -> Any:
    """A list of components as {id: component}."""
    if isinstance(value, list) and value and all(isinstance(item, dict) and "name" in item for item in value):
        keys = [str(item.get("id", item["name"])) for item in value]
        return dict(zip(keys, value, strict=True)) if len(set(keys)) == len(keys) else value
    return {} if value == [] else value


def _without_defaults(recipe: Recipe) -> dict[tuple[str, ...], dict[str, Any]]:
    """path -> each component with the options that are not its defaults."""
    slots = recipe.slots()
    ids = {slot.place: slot.id for slot in slots}
    short: dict[tuple[str, ...], dict[str, Any]] = {}
    for slot in slots:
        options = slot.config.model_dump(mode="json", by_alias=True, exclude_defaults=True)
        short[_by_ids(slot.place, ids)] = {"name": slot.cls.name, **options}
    return short


def _by_ids(place: KeyPath, ids: Mapping[KeyPath, str]) -> tuple[str, ...]:
    """A component's path, in which those of a list go by their id."""
    parts = enumerate(place, start=1)
    return tuple(ids.get(place[:end], "") if isinstance(part, int) else str(part) for end, part in parts)


@dataclass(frozen=True)
class Comparison:
    """Runs, grouped where only the seed differs."""

    table: StudyTable
    differences: Mapping[str, Sequence[str]]
    """path -> a word for each group of the table."""
    unfinished: tuple[str, ...]


def compare(folders: Sequence[Path], registry: Registry, scores: Sequence[str] = ()) -> Comparison:
    """Read run folders; the first one's group is the base.

    Raises `UserError` for what is no run folder, and for a score that no run has.
    """
    recipes = [run_recipe(folder, registry) for folder in folders]
    kinds: list[dict[str, Any]] = []
    members: list[list[int]] = []
    for i, recipe in enumerate(recipes):
        recipe_method = method(recipe)
        place = kinds.index(recipe_method) if recipe_method in kinds else -1
        has_seed = place >= 0 and recipe.seed in [recipes[j].seed for j in members[place]]
        if place < 0 or has_seed:  # the same seed again: a separate run, not a second sample
            kinds.append(recipe_method)
            members.append([i])
        else:
            members[place].append(i)
    results = {i: RunResult.read(folder, recipes[i].seed) for i, folder in enumerate(folders)}
    groups: list[Group] = []
    for indices in members:
        name = _group_name([folders[i].name for i in indices])
        names = [group.name for group in groups]
        name = name if name not in names else str(folders[indices[0]])
        group_results = tuple(result for i in indices if (result := results[i]) is not None)
        groups.append(Group(name, name, group_results, len(indices)))
    finished = [result for result in results.values() if result is not None]
    chosen_scores = list(scores) or default_scores(finished)
    if finished and (unknown := unknown_scores(chosen_scores, finished)):
        raise RecipeErrors([f"--score: {line}" for line in unknown.values()])
    return Comparison(
        StudyTable.of("comparison", groups, groups[0].name, chosen_scores),
        differences([recipes[indices[0]] for indices in members]),
        tuple(str(folders[i]) for i, result in results.items() if result is None),
    )


def _group_name(names: Sequence[str]) -> str:
    """The common prefix of the folders' names, without the seed."""
    if len(names) == 1:
        return names[0]
    common = takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    prefix = "".join(letters[0] for letters in common)
    return re.sub(r"seed\d*$", "", prefix).rstrip("-_.") or f"{names[0]}, ..."
