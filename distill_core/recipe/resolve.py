"""YAML -> `Recipe`: every error at `file:line: path: message`, all of a file at once.

What the components need of one another is checked here too, before any data or weights are touched.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from distill_core.contracts.slot import PLACE, Context, Slot
from distill_core.errors import KeyPath, RecipeErrors
from distill_core.recipe.build import NeedsMemory
from distill_core.recipe.checks import problems, unknown_score, unread
from distill_core.recipe.document import Document, located, read_document, read_file
from distill_core.recipe.draft import Draft, Problem
from distill_core.recipe.messages import messages
from distill_core.recipe.named import recipe_file
from distill_core.recipe.part_paths import unknown_paths, unknown_paths_of_model
from distill_core.recipe.places import Place, places
from distill_core.recipe.sections import Recipe
from distill_core.recipe.stages import stage_problems, unfit_weights, unreached
from distill_core.registry import Registry

Override = str | tuple[str, str]
"""`path=value`, or that and where it was written."""


def load_recipe(
    file: str | Path,
    *,
    registry: Registry,
    overrides: Sequence[Override] = (),
    allow_unset: bool = False,
    recorded: bool = False,
) -> Recipe:
    """Read and check a recipe: a file, or the name of one that a plugin provides.

    Raises `RecipeErrors` with all errors.

    `overrides` are `path=value` strings, each with the place it was written at where that is not the command line.
    `allow_unset` turns unset `${NAME}` into warnings; `recorded`, for a run's own recipe, does so too, and does not
    check the score of the best checkpoint.
    """
    file = recipe_file(file)
    return parse_recipe(
        read_file(file, "recipe"),
        str(file),
        registry=registry,
        overrides=overrides,
        allow_unset=allow_unset,
        recorded=recorded,
        default_name=file.stem,
    )


def parse_recipe(
    text: str,
    file: str,
    *,
    registry: Registry,
    overrides: Sequence[Override] = (),
    allow_unset: bool = False,
    recorded: bool = False,
    default_name: str = "run",
) -> Recipe:
    """As `load_recipe`, from text."""
    document = read_document(text, file)
    if "recipe" in document.data and not {"backbone", "loss"} & document.data.keys():
        raise RecipeErrors([f"{file}: is a study, and no recipe: distill ablate {file}"])
    resolver = _Resolver(document, registry, allow_unset, recorded)
    resolver.write_out()
    failed: list[str] = []
    for override in overrides:
        try:
            resolver.change(*((override,) if isinstance(override, str) else override))
        except RecipeErrors as error:
            failed.extend(error.lines)
    if failed:
        raise RecipeErrors(failed)
    document.data.setdefault("name", default_name)
    return resolver.resolve()


class _Resolver:
    def __init__(
        self, document: Document, registry: Registry, allow_unset: bool, recorded: bool, stage: str = ""
    ) -> None:
        self.document = document
        self.registry = registry
        self.stage = stage  # `stages.0: `, where the document is that of a stage
        self.allow_unset, self.recorded = allow_unset or recorded, recorded
        self.errors: list[tuple[str, str]] = []  # (where it was written, line)
        self.replaced: dict[KeyPath, dict[str, Any]] = {}  # components that a change replaced by another

    def change(self, assignment: str, origin: str | None = None) -> None:
        """Apply one override. Raises `RecipeErrors`."""
        path, previous = self.document.set(assignment, origin)
        named = isinstance(self.document.get(path), str)
        self.write_out()  # so that the next one finds loss.1.weight where `loss.1` was a bare name
        self.replaced.pop(path, None)
        if named and isinstance(previous, dict) and isinstance(self.document.get(path), dict):
            self.replaced[path] = previous

    def write_out(self) -> None:
        """`none` for a component or a section is `null`; a bare name is `{name: NAME}`."""
        for place in self._places():
            value, parent = self.document.get(place.path), self.document.get(place.path[:-1])
            slot = bool(place.interfaces)
            if isinstance(value, str) and value.lower() == "none" and (slot or place.nullable):
                parent[place.path[-1]] = value = None
            elif isinstance(value, str) and slot and "${" not in value:
                parent[place.path[-1]] = {"name": value}
            elif isinstance(value, dict) and place.unnamed is not None:
                value.setdefault("name", place.unnamed)
            if value is None and place.item and isinstance(parent, dict):
                del parent[place.path[-1]]

    def _places(self) -> list[Place]:
        return list(places(Recipe, self.document.data, self.registry))

    def resolve(self) -> Recipe:
        """The recipe. Raises `RecipeErrors`."""
        unset, warnings = {}, []
        for path, name in self.document.expand():
            unset[path] = f"the environment variable {name} is not set; set it, or give a value with --set"
            if self.allow_unset:
                warnings.append(self._line(path, unset[path]))
            else:
                self._error(path, unset[path])
        self.write_out()
        context = Context(self.registry)
        wrong: set[KeyPath] = set()
        recipe: Recipe | None = None
        try:
            recipe = Recipe.model_validate_json(json.dumps(self._with_places()), context=context)
        except ValidationError as error:
            for path, message, at in messages(error, self.document, self._option_names, unset):
                self._error(path, message, at)
                wrong.add(path)
            draft = Draft.without(wrong, self.document, context.slots, self.registry)
        else:
            draft = Draft.of(recipe, self.document, context.slots)
        self._refuse(problems(draft), unknown_paths(draft))
        if not self.recorded:  # a run's own recipe is read with other tasks, too, to score it
            self._refuse(unknown_score(draft))
        self._raise()
        assert recipe is not None
        later = "freeze, train.lr_factors, train.lr_decay: their paths are checked only when training starts"
        unchecked = self._refuse_built(unknown_paths_of_model(recipe), later)
        self._raise()
        stages, of_stages = self._stages(recipe)
        warnings += [*self._own_defaults(context.slots), *unchecked, *of_stages, *unreached(recipe)]
        if not self.stage:  # a stage is read together with the others
            warnings += unread([recipe, *stages])
        return recipe.with_stages(*stages).with_warnings(*dict.fromkeys(warnings))  # a stage repeats the recipe's own

    def _stages(self, recipe: Recipe) -> tuple[list[Recipe], list[str]]:
        """The recipe of each stage, resolved and checked as if it were one by itself, and their own warnings."""
        document = Document(copy.deepcopy(self.document.data), self.document.name, dict(self.document.origins))
        document.data.pop("stages", None)
        stages: list[Recipe] = []
        wrong: dict[str, str] = {}
        for i in range(len(recipe.stages)):
            document = Document(copy.deepcopy(document.data), document.name, dict(document.origins))
            resolver = _Resolver(document, self.registry, self.allow_unset, self.recorded, f"stages.{i}: ")
            lines: list[str] = []
            # as it is written: its lists are counted with what the command line takes out of them
            for path, value in self.document.get(("stages", i, "set")).items():
                origin = self.document.origin(("stages", i, "set", path))
                try:
                    resolver.change(f"{path}={json.dumps(value)}", origin)
                except RecipeErrors as error:
                    lines += [line.replace(f"{origin}: ", f"{origin}: {resolver.stage}", 1) for line in error.lines]
            try:
                stages.append(resolver.resolve())
            except RecipeErrors as error:
                lines += error.lines
            for line in lines:  # a later stage repeats what is wrong in one before it
                wrong.setdefault(line.replace(resolver.stage, "", 1), line)
        if wrong:
            raise RecipeErrors([*wrong.values()])
        self._refuse(stage_problems(recipe, stages))
        unchecked = self._refuse_built(
            unfit_weights(recipe, stages), "stages: whether weights fit is checked only when a stage begins"
        )
        self._raise()
        return stages, [*unchecked, *(line for stage in stages for line in stage.warnings)]

    def _with_places(self) -> dict[str, Any]:
        """The document with the place of each component beside its options, and defaults where none is written."""
        data: dict[str, Any] = copy.deepcopy(self.document.data)
        document = Document(data, self.document.name)
        for place in self._places():
            if not place.interfaces:
                continue
            parent: Any = document.get(place.path[:-1])
            key = place.path[-1]
            if place.default is not None and key not in parent:
                installed = any((one.kind, place.default) in self.registry.entries for one in place.interfaces)
                parent[key] = {"name": place.default} if installed or not place.nullable else None
            value = document.get(place.path)
            if isinstance(value, dict):
                value[PLACE] = place.path
            elif value is None and place.item:
                parent[key] = {PLACE: None}
        stages = data.get("stages")
        for stage in stages if isinstance(stages, list) else ():
            if isinstance(stage, dict) and isinstance(stage.get("set"), dict):
                changes = stage["set"].items()
                stage["set"] = {_recounted(path, self.document.data): value for path, value in changes}
        return data

    def _option_names(self, path: KeyPath) -> list[str]:
        """What may be written at a path."""
        return [name for place in self._places() if place.path == path for name in place.option_names()]

    def _refuse(self, *problems: Iterable[Problem]) -> None:
        for path, message in chain(*problems):
            self._error(path, message)

    def _refuse_built(self, problems: Iterable[Problem], later: str) -> list[str]:
        """`_refuse` what a model that is built without memory shows; a warning where it cannot be built so."""
        try:
            self._refuse(problems)
        except NeedsMemory as error:
            return [f"{later}, since {error}"]
        return []

    def _error(self, path: KeyPath, message: str, at: KeyPath | None = None) -> None:
        """`at`: the part that caused the error, if the message is about something above it."""
        origin = self.document.origin(at or path)
        if not origin.startswith("--set"):  # a change on the command line is the likely cause
            origins = [where for part, where in self.document.origins.items() if part[: len(path)] == path]
            changed = dict.fromkeys(where for where in origins if where.startswith("--set"))
            message += f" (with {', '.join(changed)})" if changed else ""
        self.errors.append((origin, self._line(path, message, at)))

    def _raise(self) -> None:
        """All errors so far, in the order of the document."""
        if self.errors:
            order = {line: i for i, line in enumerate(self.document.origins.values())}
            lines = sorted(set(self.errors), key=lambda error: (order.get(error[0], -1), error[1]))
            raise RecipeErrors([line for _, line in lines])

    def _line(self, path: KeyPath, message: str, at: KeyPath | None = None) -> str:
        origin = self.document.origin(at or path)
        if not self.stage:
            return f"{located(origin, path)}: {message}"
        return f"{located(f'{origin}: {self.stage[:-2]}', path)}: {message}"

    def _own_defaults(self, slots: dict[KeyPath, Slot[Any]]) -> Iterator[str]:
        """A line for each component that a bare name replaced, and that had options the new one has too.

        The new one has its own defaults: an option of the same name may mean another thing (a scale, a width).
        """
        for path, previous in self.replaced.items():
            if (slot := slots.get(path)) is None:
                continue
            options, name = slot.config.model_dump(mode="json", by_alias=True), slot.cls.name
            shared = {key: value for key, value in previous.items() if key in options and options[key] != value}
            if shared:
                listed = ", ".join(f"{key}: {json.dumps(value)}" for key, value in shared.items())
                yield self._line(
                    path,
                    f"{name!r} starts from its own defaults, without the recipe's {listed} of {previous['name']!r}; "
                    f"write {{name: {name}, {listed}}} to give it the same",
                )


def _recounted(path: str, data: Any) -> str:
    """A stage's path, whose lists are counted without the items that are taken out of them (null)."""
    keys = str(path).split(".")
    for i, key in enumerate(keys):
        if isinstance(data, list) and key.isdecimal():
            number = int(key)
            keys[i] = str(number - sum(item is None for item in data[:number]))
            data = data[number] if number < len(data) else None
        else:
            data = data.get(key) if isinstance(data, dict) else None
    return ".".join(keys)
