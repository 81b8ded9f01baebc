"""YAML text -> plain data that remembers where each value came from; `--set` overrides; `${NAME}` expansion.

The grammar is YAML 1.2's core schema where PyYAML's 1.1 surprises: `5e-4` is a number, `off` is a string, a key given
twice is an error. Paths are dotted: `loss.1.weight`; an item of a list may also be named by its `id` or `name`.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from distill_core.errors import RecipeErrors

Path = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012  (PyYAML's own table, started afresh)


_NUMBER = re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$")
for _tag, _pattern, _first in (
    ("bool", r"^(true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("int", r"^[-+]?[0-9]+$", "-+0123456789"),
    ("float", rf"{_NUMBER.pattern}|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$", "-+.0123456789"),
    ("null", r"^(~|null|Null|NULL|)$", ["~", "n", "N", ""]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list(_first))


def _number(loader: _Loader, node: yaml.ScalarNode) -> int | float:
    text = node.value.lower()
    if text.endswith((".inf", ".nan")):
        return float(text.replace(".inf", "inf").replace(".nan", "nan"))
    value = float(text)
    # 1e3 is an integer in every reading but a float's, and a float option takes integers
    return int(value) if "e" in text and "." not in text and value.is_integer() else value


_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))
_Loader.add_constructor("tag:yaml.org,2002:float", _number)


def parse_value(text: str) -> Any:
    """One YAML value, as `--set` takes it. Raises yaml.YAMLError."""
    return yaml.load(text, Loader=_Loader)


@dataclass
class Document:
    """Plain data and, for each path, where it was written (`recipe.yaml:6`, or `--set fusion.heads`)."""

    data: Any
    name: str
    origins: dict[Path, str] = field(default_factory=dict)

    def origin(self, path: Path) -> str:
        """Where the value at `path`, or the nearest thing above it, was written."""
        while path and path not in self.origins:
            path = path[:-1]
        return self.origins.get(path, f"{self.name}:1")

    def locate(self, path: Path) -> Path:
        """The path with names and ids of list items turned into their numbers."""
        node, result = self.data, list[str | int]()
        for part in path:
            if isinstance(node, list):
                part = _item(node, part)
            result.append(part)
            node = _child(node, part)
        return tuple(result)

    def set(self, assignment: str) -> None:
        """Apply `path=value`. Raises `RecipeErrors`."""
        key, equals, text = assignment.partition("=")
        origin = f"--set {key.strip()}"
        if not equals or not key.strip():
            raise RecipeErrors([f"--set {assignment}: write it as path=value, for example loss.1.weight=0.5"])
        try:
            value = parse_value(text)
        except yaml.YAMLError as error:
            problem = getattr(error, "problem", None) or "not YAML"
            raise RecipeErrors([f"{origin}: {key.strip()}: {problem} in {text!r}"]) from error
        path = self.locate(tuple(key.strip().split(".")))
        node = self.data
        for depth, part in enumerate(path[:-1]):
            below = _child(node, part)
            if isinstance(below, str) and isinstance(node, dict):
                below = node[part] = {"name": below}
            if below is None and isinstance(node, dict):
                below = node[part] = {}
            if not isinstance(below, dict | list):
                raise RecipeErrors([f"{origin}: {_dotted(path)}: {_dotted(path[: depth + 1])} has no parts to set"])
            node = below
        last = path[-1]
        if isinstance(node, list):
            if not isinstance(last, int) or not 0 <= last <= len(node):
                raise RecipeErrors([f"{origin}: {_dotted(path)}: the list has {len(node)} items, counted from 0"])
            if last == len(node):
                node.append(value)
            else:
                node[last] = value
        else:
            node[last] = value
        for known in [p for p in self.origins if p[: len(path)] == path]:
            del self.origins[known]
        self.origins[path] = origin

    def expand(self) -> list[tuple[Path, str]]:
        """Put environment variables into `${NAME}`; returns (path, name) of those that are not set.

        A value that is nothing but `${NAME}` is read as YAML again, so that a number stays a number.
        """
        missing: list[tuple[Path, str]] = []

        def walk(node: Any, path: Path) -> Any:
            if isinstance(node, dict):
                return {key: walk(value, (*path, key)) for key, value in node.items()}
            if isinstance(node, list):
                return [walk(value, (*path, i)) for i, value in enumerate(node)]
            if not isinstance(node, str) or "${" not in node:
                return node

            def put(match: re.Match[str]) -> str:
                value = os.environ.get(match[1])
                if value is None:
                    missing.append((path, match[1]))
                    return match[0]
                return value

            text = _VARIABLE.sub(put, node)
            if _VARIABLE.fullmatch(node) and text != node:
                try:
                    return parse_value(text)
                except yaml.YAMLError:
                    return text
            return text

        self.data = walk(self.data, ())
        return missing


_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


def _child(node: Any, part: str | int) -> Any:
    if isinstance(node, dict):
        return node.get(part)
    if isinstance(node, list) and isinstance(part, int) and 0 <= part < len(node):
        return node[part]
    return None


def _item(items: list[Any], part: str | int) -> str | int:
    if isinstance(part, int) or part.isdigit():
        return int(part)
    for key in ("id", "name"):
        found = [i for i, item in enumerate(items) if (item if isinstance(item, str) else _child(item, key)) == part]
        if len(found) == 1:
            return found[0]
    return part


def _dotted(path: Path) -> str:
    return ".".join(str(part) for part in path)


def read_document(text: str, name: str) -> Document:
    """Parse one YAML document. Raises `RecipeErrors` (`name:line: ...`) for bad YAML and keys given twice."""
    loader = _Loader(text)
    errors: list[str] = []
    origins: dict[Path, str] = {}

    def build(node: yaml.Node, path: Path) -> Any:
        if isinstance(node, yaml.MappingNode):
            result: dict[Any, Any] = {}
            lines: dict[Any, int] = {}
            for key_node, value_node in node.value:
                key = loader.construct_object(key_node, deep=True)
                line = key_node.start_mark.line + 1
                if isinstance(key, int | float | bool) or key is None:
                    key = str(key_node.value)
                if not isinstance(key, str):
                    errors.append(f"{name}:{line}: {_dotted(path)}: a key must be a word")
                    continue
                if key in lines:
                    errors.append(
                        f"{name}:{line}: {_dotted((*path, key))}: given twice, first in line {lines[key]}; keep one"
                    )
                    continue
                lines[key] = line
                origins[*path, key] = f"{name}:{line}"
                result[key] = build(value_node, (*path, key))
            return result
        if isinstance(node, yaml.SequenceNode):
            items = []
            for i, item in enumerate(node.value):
                origins[*path, i] = f"{name}:{item.start_mark.line + 1}"
                items.append(build(item, (*path, i)))
            return items
        return loader.construct_object(node, deep=True)

    try:
        root = loader.get_single_node()
        data = build(root, ()) if root is not None else {}
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark is not None else 1
        problem = getattr(error, "problem", None) or str(error)
        raise RecipeErrors([f"{name}:{line}: not YAML: {problem}"]) from error
    finally:
        loader.dispose()
    if not isinstance(data, dict):
        errors.append(f"{name}:1: a recipe is a mapping of sections (augment, backbone, loss, ...)")
    if errors:
        raise RecipeErrors(errors)
    return Document(data, name, origins)
