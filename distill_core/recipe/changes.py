"""In which options two recipes differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Path -> (what it was, what it is), of the options in which two of `Recipe.to_dict` differ.

    Of a component in another's place the names alone; a list of another length as a whole.
    """
    return {path: pair for key in {**old, **new} for path, pair in _changes(old.get(key), new.get(key), key)}


def _changes(old: Any, new: Any, path: str) -> Iterator[tuple[str, tuple[Any, Any]]]:
    if old == new:
        return
    lists = isinstance(old, list) and isinstance(new, list) and len(old) == len(new)
    if lists and all(isinstance(item, Mapping) for item in [*old, *new]):
        for i, (a, b) in enumerate(zip(old, new, strict=True)):
            yield from _changes(a, b, f"{path}.{i}")
    elif not (isinstance(old, Mapping) and isinstance(new, Mapping)):
        yield path, (old, new)
    elif old.get("name") != new.get("name"):
        yield f"{path}.name", (old.get("name"), new.get("name"))
    else:
        for key in {**old, **new}:
            yield from _changes(old.get(key), new.get(key), f"{path}.{key}")
