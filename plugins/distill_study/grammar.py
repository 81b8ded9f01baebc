"""The study file: a base recipe, named variants of it, seeds and a budget. Every error is `file:line: ...`."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from distill_core import ComponentConfig, UserError, did_you_mean
from distill_core.tools import Document, KeyPath, RecipeErrors, option_message, read_document, read_file, recipe_file

Change = tuple[str, str]
"""`path=value`, and where it was written."""

_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
Positive = Annotated[int, Field(gt=0)]


class Budget(ComponentConfig):
    """How long each run is, the same for all variants; one of `steps`, `samples` and `seconds`."""

    steps: Positive | None = None
    """Optimiser steps."""
    samples: Positive | None = None
    """Training samples: steps = samples / batch size, rounded, of each variant."""
    seconds: Annotated[float, Field(gt=0)] | None = None
    """Seconds of training. Each variant is timed first, and gets the steps that fit (see docs/studies.md)."""
    calibrate: Annotated[int, Field(ge=4)] = 24
    """Steps that a variant is timed for; only the second half counts."""


class StudyFile(ComponentConfig):
    """What a study file holds."""

    recipe: str
    """The base recipe: a path relative to the study file, or the name of a recipe that a plugin provides."""
    name: Annotated[str, Field(pattern=f"^{_WORD.pattern}$")] | None = None
    """The study's folder; by default the file's name."""
    changes: Any = Field(None, alias="set")
    """Changes that all variants share: {path: value}, or a list of path=value."""
    variants: dict[str, Any] | None = None
    """Name -> its changes ({path: value}, or a list of path=value); `recipe:` among them names another base."""
    swaps: dict[str, Any] | None = None
    """Instead of variants: path -> the values to try there, a list or {name: value}."""
    design: Literal["grid", "one_at_a_time"] = "grid"
    """All combinations of the swaps, or the unchanged recipe and each swap alone."""
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)] = [0]  # noqa: RUF012
    """Each variant is trained once with each seed."""
    budget: Budget | None = None
    """The length of all runs; without it each recipe keeps its own."""
    base: str | None = None
    """The variant that others are compared with; by default the first."""
    scores: list[str] = []  # noqa: RUF012
    """Scores of report.json for the table, as student/retrieval/M; by default the student's headlines."""


@dataclass(frozen=True)
class Variant:
    """One row of the table: a recipe and what is changed in it."""

    name: str
    """Run folders are NAME-seedN."""
    label: str
    recipe: str
    changes: tuple[Change, ...]
    origin: str


@dataclass(frozen=True)
class Study:
    """A study as it was written; its recipes are not read yet."""

    name: str
    shared: tuple[Change, ...]
    variants: tuple[Variant, ...]
    seeds: tuple[int, ...]
    budget: Budget | None
    base: str
    scores: tuple[str, ...]
    one_at_a_time: bool
    document: Document

    def where(self, *path: str | int) -> str:
        """The place of `path` in the study file."""
        return self.document.origin(path)


def read_study_document(file: str | Path) -> Document:
    """The YAML of a study file. Raises `RecipeErrors`."""
    return read_document(read_file(file, "file"), str(file))


def swaps_document(recipe: str, swaps: Sequence[str]) -> Document:
    """The study that `--swap PATH=A,B` options stand for. Raises `RecipeErrors`."""
    document = Document({"recipe": recipe, "swaps": {}}, recipe)
    for swap in swaps:
        path, equals, text = (part.strip() for part in swap.partition("="))
        if not equals or not path or not text:
            raise RecipeErrors([f"--swap {swap}: write it as path=value,value, as fusion=none,cross_attention"])
        if path in document.data["swaps"]:
            raise RecipeErrors([f"--swap {path}: given twice; name all its values in one"])
        document.data["swaps"][path] = read_document(f"values: [{text}]", f"--swap {path}").data["values"]
        document.origins["swaps", path] = f"--swap {path}"
    return document


def make_study(document: Document, folder: Path, default_name: str, overrides: Sequence[str] = ()) -> Study:
    """Check a study's document; recipes are relative to `folder`. `overrides` are the command line's `--set`.

    Raises `RecipeErrors` with all errors.
    """
    return _Reader(document, folder).study(default_name, overrides)


class _Reader:
    def __init__(self, document: Document, folder: Path) -> None:
        self.document = document
        self.folder = folder
        self.recipe = ""
        self.errors: list[str] = []

    def error(self, path: KeyPath, message: str) -> None:
        dotted = ".".join(str(part) for part in path)
        self.errors.append(f"{self.document.origin(path)}: {dotted}{': ' if dotted else ''}{message}")

    def study(self, default_name: str, overrides: Sequence[str] = ()) -> Study:
        file = self._study_file()
        if file is None:
            raise RecipeErrors(self.errors)
        self.recipe = self._recipe_file(("recipe",), file.recipe)
        shared = [*self._changes(("set",), file.changes, file.budget)]
        for change in overrides:
            target = change.partition("=")[0].strip()
            if (problem := _reserved(target, file.budget)) is not None:
                self.errors.append(f"--set {target}: {problem}")
            shared.append((change, f"--set {target}"))
        if (file.variants is None) == (file.swaps is None):
            self.error((), "give `variants` or `swaps`, one of them")
            variants = []
        elif file.variants is not None:
            variants = [self._variant(file, name, value) for name, value in file.variants.items()]
        else:
            variants = self._swapped(file)
        if not variants and not self.errors:
            self.error(("variants",) if file.variants is not None else ("swaps",), "there is no variant")
        names = [variant.name for variant in variants]
        base = file.base or (names[0] if names else "")
        if file.base is not None and names and file.base not in names:
            self.error(("base",), f"no variant {file.base!r}{did_you_mean(file.base, names)}")
        for i, seed in enumerate(file.seeds):
            if seed in file.seeds[:i]:
                self.error(("seeds", i), f"seed {seed} is given twice")
        if self.errors:
            raise RecipeErrors(self.errors)
        return Study(
            name=file.name or default_name,
            shared=tuple(shared),
            variants=tuple(variants),
            seeds=tuple(file.seeds),
            budget=file.budget,
            base=base,
            scores=tuple(file.scores),
            one_at_a_time=file.swaps is not None and file.design == "one_at_a_time",
            document=self.document,
        )

    def _study_file(self) -> StudyFile | None:
        try:
            file = StudyFile.model_validate_json(json.dumps(self.document.data))
        except ValidationError as error:
            for item in error.errors(include_url=False):
                path: KeyPath = tuple(item["loc"])
                if item["type"] == "extra_forbidden":
                    model = Budget if path[0] == "budget" else StudyFile
                    names = [field.alias or name for name, field in model.model_fields.items()]
                    self.error(path, f"unknown option {path[-1]!r}{did_you_mean(str(path[-1]), names)}")
                else:
                    value = item["input"]
                    suffix = f", got {value!r}" if value is None or isinstance(value, str | int | float) else ""
                    self.error(path, option_message(item) + suffix)
            return None
        budget = file.budget
        if budget is not None and sum(v is not None for v in (budget.steps, budget.samples, budget.seconds)) != 1:
            self.error(("budget",), "give one of `steps`, `samples` and `seconds`")
        return file

    def _changes(self, path: KeyPath, value: Any, budget: Budget | None) -> Iterator[Change]:
        if value is not None and not isinstance(value, dict | list):
            self.error(path, "changes are {path: value} or a list of path=value")
            return
        items = enumerate(value) if isinstance(value, list) else (value or {}).items()
        for key, item in items:
            place = (*path, key)
            if isinstance(value, list):
                if not isinstance(item, str):
                    self.error(place, "write it as path=value, for example loss.1.weight=0.5")
                    continue
                change = item
            else:
                change = _assignment(str(key), item)
            self._allowed(place, change.partition("=")[0].strip(), budget)
            yield change, self.document.origin(place)

    def _variant(self, file: StudyFile, name: str, value: Any) -> Variant:
        path: KeyPath = ("variants", name)
        if not _WORD.fullmatch(name):
            self.error(path, "a variant's name is a word of letters, digits, - . and _")
        recipe = self.recipe
        if isinstance(value, dict) and "recipe" in value:
            base = value["recipe"]
            value = {key: item for key, item in value.items() if key != "recipe"}
            if isinstance(base, str):
                recipe = self._recipe_file((*path, "recipe"), base)
            else:
                self.error((*path, "recipe"), "is the path or the name of a recipe")
        changes = tuple(self._changes(path, value, file.budget))
        return Variant(name, name, recipe, changes, self.document.origin(path))

    def _recipe_file(self, path: KeyPath, recipe: str) -> str:
        try:
            return str(recipe_file(recipe, self.folder))
        except RecipeErrors as error:
            for line in error.lines:
                self.error(path, line)
            return recipe

    def _swapped(self, file: StudyFile) -> list[Variant]:
        axes: list[list[tuple[str, Change]]] = []
        for path, values in (file.swaps or {}).items():
            place: KeyPath = ("swaps", path)
            if not isinstance(values, dict | list) or not values:
                self.error(place, "needs the values to try: a list, or {name: value}")
                continue
            self._allowed(place, path, file.budget)
            items = values.items() if isinstance(values, dict) else enumerate(values)
            axis = []
            for key, value in items:
                word = key if isinstance(values, dict) else label_of(value)
                axis.append((f"{path}={word}", (_assignment(path, value), self.document.origin((*place, key)))))
            axes.append(axis)
        if self.errors or not axes:
            return []
        combinations: list[tuple[tuple[str, Change], ...]]
        if file.design == "grid":
            combinations = list(itertools.product(*axes))
        else:
            combinations = [(), *((swap,) for axis in axes for swap in axis)]
        variants: list[Variant] = []
        for parts in combinations:
            label = ", ".join(label for label, _ in parts) or "base"
            name = re.sub(r"[^A-Za-z0-9._]+", "-", label).strip("-._")[:80]
            names = [variant.name for variant in variants]
            if name in names:
                name = next(f"{name}-{i}" for i in itertools.count(2) if f"{name}-{i}" not in names)
            origin = parts[-1][1][1] if parts else self.document.origin(("swaps",))
            variants.append(Variant(name, label, self.recipe, tuple(change for _, change in parts), origin))
        return variants

    def _allowed(self, place: KeyPath, target: str, budget: Budget | None) -> None:
        if (problem := _reserved(target, budget)) is not None:
            self.error(place, problem)


def _reserved(target: str, budget: Budget | None) -> str | None:
    """Why a change of the path `target` would have no effect in a study."""
    if target in ("name", "seed"):
        return f"{target!r} is set by the study; see `{target if target == 'name' else 'seeds'}`"
    if target in ("train", "train.steps", "train.epochs") and budget is not None:
        return f"{target!r} and `budget` are both given; remove one"
    return None


def _assignment(path: str, value: Any) -> str:
    """`path=value` for a parsed value; JSON is valid YAML, except for numbers that are not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"{path}={'.nan' if math.isnan(value) else '.inf' if value > 0 else '-.inf'}"
    return f"{path}={json.dumps(value, ensure_ascii=False)}"


def label_of(value: Any) -> str:
    """A value as a label: `none`, `cross_attention`, `cross_attention(heads=2)`, `(momentum=0.9)`, `0.5`."""
    if value is None:
        return "none"
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        name = value["name"] if isinstance(value.get("name"), str) else ""
        options = ", ".join(f"{key}={label_of(item)}" for key, item in value.items() if not (name and key == "name"))
        return name + (f"({options})" if options else "" if name else "(defaults)")
    return json.dumps(value, ensure_ascii=False)


def option_values(text: str, option: str) -> list[Any]:
    """The values of a comma-separated option, read as YAML. Raises `UserError`."""
    values = read_document(f"values: [{text}]", option).data["values"]
    if not values:
        raise UserError(f"{option}: needs a value")
    result: list[Any] = values
    return result
