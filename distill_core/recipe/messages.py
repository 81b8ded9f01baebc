"""What pydantic says of a recipe's options, in the recipe's own words."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from distill_core.errors import did_you_mean
from distill_core.recipe.document import Path


def messages(
    error: ValidationError,
    base: Path,
    model: Any,
    has: Callable[[Path], bool],
    unset: Mapping[Path, str],
    *,
    plain: bool,
) -> Iterator[tuple[Path, str]]:
    """(path, message) of what is wrong with the options of `model` at `base`.

    `has` tells whether something is written at a path, and `unset` has a message for values that an unset variable
    left; `plain`: the model is a section, which takes neither `name` nor `id`.
    """
    found: dict[Path, list[str]] = {}
    given: dict[Path, str] = {}
    for item in error.errors(include_url=False):
        # union branches add their type's name to the location; only what is in the document is a path
        path: Path = base
        for part in item["loc"]:
            if has((*path, part)) or item["type"] in ("missing", "extra_forbidden"):
                path = (*path, part)
        if item["type"] == "extra_forbidden":
            known = options_at(model, path[len(base) : -1])
            if not plain and len(path) == len(base) + 1:
                known += ["name", "id"]
            message = f"unknown option {path[-1]!r}{did_you_mean(str(path[-1]), known)}"
        elif item["type"] == "missing":
            message = "is required and not given"
        else:
            value = item["input"]
            message = item["msg"].removeprefix("Value error, ")
            told = isinstance(value, str) and repr(value) in message
            shown = value is None or (isinstance(value, str | int | float) and not told)
            given[path] = f", got {value!r}" if shown else ""
        if path in unset:
            found[path], given[path] = [unset[path]], ""
        elif message not in found.setdefault(path, []):
            found[path].append(message)
    for path, lines in found.items():
        # of a union's branches, the one that fits most of what is written fails deepest
        if not any(other[: len(path)] == path for other in found if other != path):
            first, *others = lines
            more = "".join(f" or {line.removeprefix('Input should be ')}" for line in others)
            yield path, first + more + given.get(path, "")


def options_at(model: Any, path: Path) -> list[str]:
    """The option names of the (nested) config at `path` inside `model`."""
    for part in path:
        annotation = getattr(model, "model_fields", {}).get(part)
        model = annotation.annotation if annotation is not None else None
        for choice in getattr(model, "__args__", ()):
            if hasattr(choice, "model_fields"):
                model = choice
    fields = getattr(model, "model_fields", {})
    return [field.alias or name for name, field in fields.items()]
