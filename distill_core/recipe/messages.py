"""pydantic's errors, translated to the terms of the recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from distill_core.errors import KeyPath, did_you_mean, option_message
from distill_core.recipe.document import Document


def messages(
    error: ValidationError,
    document: Document,
    options: Callable[[KeyPath], Sequence[str]],
    unset: Mapping[KeyPath, str],
) -> Iterator[tuple[KeyPath, str, KeyPath]]:
    """(path, message, the part to blame) of each thing that is wrong with the document.

    `options` has the names of options that may be written at a path, and `unset` a message for values that an unset
    variable left.
    """
    lines: dict[KeyPath, list[str]] = {}
    endings: dict[KeyPath, str] = {}
    blamed: dict[KeyPath, KeyPath] = {}
    for item in error.errors(include_url=False):
        # union branches add their type's name to the location; only what is in the document is a path
        path: KeyPath = ()
        for i, part in enumerate(item["loc"], 1):
            absent = i == len(item["loc"]) and item["type"] in ("missing", "extra_forbidden")
            if document.has((*path, part)) or absent:
                path = (*path, part)
        at = path
        if item["type"] == "unknown_component":
            path = path[:-1] if path[-1:] == ("name",) else path
        message, ending = _message(item["type"], option_message(item), item["input"], path, options)
        blamed[path] = at
        if path in unset or at in unset:
            lines[path], endings[path] = [unset.get(path) or unset[at]], ""
        elif message not in lines.setdefault(path, []):
            lines[path].append(message)
            endings[path] = ending
    for path, texts in lines.items():
        # of a union's branches, the one that fits most of what is written fails deepest
        if not any(other[: len(path)] == path for other in lines if other != path):
            first, *rest = texts
            alternatives = "".join(f" or {line.removeprefix('must be ')}" for line in rest)
            yield path, first + alternatives + endings.get(path, ""), blamed[path]


def _message(
    kind: str, message: str, value: Any, path: KeyPath, options: Callable[[KeyPath], Sequence[str]]
) -> tuple[str, str]:
    """One error's message, and what follows where several errors of one place are joined."""
    if kind == "extra_forbidden":
        return f"unknown option {path[-1]!r}{did_you_mean(str(path[-1]), options(path[:-1]))}", ""
    if kind == "missing":
        return message, ""
    if kind == "too_short" and value and not isinstance(value, str) and len(path) == 1:
        return f"no {path[0]} is left", ""  # null removed each of them
    in_message = isinstance(value, str) and repr(value) in message
    shows_value = value is None or (isinstance(value, str | int | float) and not in_message)
    return message, f", got {value!r}" if shows_value else ""
