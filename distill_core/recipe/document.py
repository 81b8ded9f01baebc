"""YAML text -> plain data that remembers where each value came from, and back; `--set`; `${NAME}` expansion.

The grammar is YAML 1.2's core schema where PyYAML's 1.1 surprises: `5e-4` is a number, `off` is a string, a key given
twice is an error. Paths are dotted: `loss.1.weight`; an item of a list may also be named by its `id` or `name`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from distill_core.errors import KeyPath, RecipeErrors, did_you_mean


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


@dataclass
class Document:
    """Plain data and, for each path, where it was written (`recipe.yaml:6`, or `--set fusion.heads`)."""

    data: Any
    name: str
    origins: dict[KeyPath, str] = field(default_factory=dict)

    def origin(self, path: KeyPath) -> str:
        """Where the value at `path`, or the nearest thing above it, was written."""
        while path and path not in self.origins:
            path = path[:-1]
        return self.origins.get(path, f"{self.name}:1")

    def get(self, path: KeyPath) -> Any:
        """The value at `path`; None where there is none."""
        node = self.data
        for part in path:
            node = _child(node, part)
        return node

    def has(self, path: KeyPath) -> bool:
        """Whether something is written at `path`, null included."""
        parent = self.get(path[:-1])
        if isinstance(parent, list):
            return isinstance(path[-1], int) and path[-1] < len(parent)
        return isinstance(parent, dict) and path[-1] in parent

    def set(self, assignment: str, origin: str | None = None) -> tuple[KeyPath, Any]:
        """Apply `path=value`, written at `origin` (the command line, if not given). Raises `RecipeErrors`.

        Returns the path, and what it held. A bare name changes nothing if a component of that name is there already.
        """
        key, equals, text = assignment.partition("=")
        if not equals or not key.strip():
            where = f"{origin}: {assignment}" if origin else f"--set {assignment}"
            raise RecipeErrors([f"{where}: write it as path=value, for example loss.1.weight=0.5"])
        origin = origin or f"--set {key.strip()}"
        try:
            value, _ = _read(text)
        except _NotPlain as error:
            prefix = tuple(key.strip().split("."))
            lines = [f"{located(origin, (*prefix, *child))}: {what} in {text!r}" for _, child, what in error.problems]
            raise RecipeErrors(lines) from error
        parts: list[str | int] = list(key.strip().split("."))
        node = self.data
        for depth, part in enumerate(parts):
            if isinstance(node, list):
                part = parts[depth] = _item(node, part)
                if not isinstance(part, int) or part > len(node):
                    reason = f"the list has no item {part!r}; it has {len(node)}, counted from 0"
                    raise RecipeErrors([f"{located(origin, parts)}: {reason}"])
                if part == len(node):
                    node.append(None)
            elif not isinstance(node, dict):
                raise RecipeErrors([f"{located(origin, parts)}: {_dotted(parts[:depth])} has no parts to set"])
            if depth + 1 == len(parts):
                break
            child = _child(node, part)
            if child is None:
                child = node[part] = [] if parts[depth + 1] == "0" else {}
                self.origins[tuple(parts[: depth + 1])] = origin
            node = child
        path = tuple(parts)
        previous = _child(node, parts[-1])
        if isinstance(previous, dict) and isinstance(value, str) and previous.get("name") == value:
            return path, previous
        node[parts[-1]] = value
        for origin_path in [p for p in self.origins if p[: len(path)] == path]:
            del self.origins[origin_path]
        self.origins[path] = origin
        return path, previous

    def expand(self) -> list[tuple[KeyPath, str]]:
        """Put environment variables into `${NAME}`; returns (path, name) of those that are not set.

        A value that is nothing but `${NAME}` is read as YAML again, so that a number stays a number.
        """
        missing: list[tuple[KeyPath, str]] = []

        def walk(node: Any, path: KeyPath) -> Any:
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
                    return _read(text)[0]
                except _NotPlain:
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
    if isinstance(part, int) or part.isdecimal():
        return int(part)
    for key in ("id", "name"):
        matches = [i for i, item in enumerate(items) if (item if isinstance(item, str) else _child(item, key)) == part]
        if len(matches) == 1:
            return matches[0]
    return part


def _dotted(path: Sequence[str | int]) -> str:
    return ".".join(str(part) for part in path)


def located(origin: str, path: Sequence[str | int]) -> str:
    """`recipe.yaml:6: fusion.heads`; an origin that names the path itself (`--set fusion.heads`) says it once."""
    dotted = _dotted(path)
    return origin if not dotted or origin == f"--set {dotted}" else f"{origin}: {dotted}"


def read_file(file: str | Path, what: str) -> str:
    """The text of a YAML file that a user names; `what` it should be. Raises `RecipeErrors`."""
    path = Path(file)
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise RecipeErrors([f"{file}: no such {what}{did_you_mean(path.name, near)}"]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeErrors([f"{file}: cannot be read: {error}"]) from error


def read_document(text: str, name: str) -> Document:
    """Parse one YAML document. Raises `RecipeErrors` (`name:line: ...`) for bad YAML and keys given twice."""
    try:
        data, lines = _read(text)
    except _NotPlain as error:
        raise RecipeErrors(
            [f"{name}:{line}: {_dotted(path)}{': ' if path else ''}{what}" for line, path, what in error.problems]
        ) from error
    data = {} if data is None else data
    if not isinstance(data, dict):
        raise RecipeErrors([f"{name}:1: a recipe is a mapping of sections (augment, backbone, loss, ...)"])
    return Document(data, name, {path: f"{name}:{line}" for path, line in lines.items()})


class _NotPlain(Exception):
    """YAML that is not a recipe's: (line, path, what is wrong) of each place."""

    def __init__(self, problems: list[tuple[int, KeyPath, str]]) -> None:
        super().__init__(problems)
        self.problems = problems


def _read(text: str) -> tuple[Any, dict[KeyPath, int]]:
    """Plain data, and the line of each path. Raises `_NotPlain`."""
    problems: list[tuple[int, KeyPath, str]] = []
    lines: dict[KeyPath, int] = {}

    def build(node: yaml.Node, path: KeyPath) -> Any:
        if isinstance(node, yaml.CollectionNode) and node.tag not in (
            _Loader.DEFAULT_MAPPING_TAG,
            _Loader.DEFAULT_SEQUENCE_TAG,
        ):
            problems.append((node.start_mark.line + 1, path, f"{node.tag} is not a recipe's value"))
        if isinstance(node, yaml.MappingNode):
            result: dict[str, Any] = {}
            for key_node, value_node in node.value:
                line = key_node.start_mark.line + 1
                if not isinstance(key_node, yaml.ScalarNode):
                    problems.append((line, path, "a key must be a word"))
                    continue
                inner = (*path, key_node.value)
                if key_node.value in result:
                    problems.append((line, inner, f"given twice, first in line {lines[inner]}; keep one"))
                    continue
                lines[inner] = line
                result[key_node.value] = build(value_node, inner)
            return result
        if isinstance(node, yaml.SequenceNode):
            for i, item in enumerate(node.value):
                lines[*path, i] = item.start_mark.line + 1
            return [build(item, (*path, i)) for i, item in enumerate(node.value)]
        value = loader.construct_object(node, deep=True)
        if value is not None and not isinstance(value, str | int | float):
            problems.append((node.start_mark.line + 1, path, f"{node.tag} is not a recipe's value"))
        return value

    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        data = build(root, ()) if root is not None else None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise _NotPlain([(line, (), f"not YAML: {error.reason} (#x{error.character:04x})")]) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark is not None else 1
        problem = getattr(error, "problem", None) or str(error)
        if "${" in "".join(text.splitlines()[line - 1 : line]):
            problem += '; inside { } and [ ], write "${NAME}" in quotes'  # a brace ends a plain word there
        elif problem.endswith("'{'"):
            problem += "; a word that holds braces goes in quotes"
        raise _NotPlain([(line, (), f"not YAML: {problem}")]) from error
    except RecursionError as error:
        raise _NotPlain([(1, (), "an alias (*) is inside the value that it names")]) from error
    if problems:
        raise _NotPlain(problems)
    return data, lines


class _Dumper(yaml.SafeDumper):
    def represent_data(self, data: Any) -> yaml.Node:
        node = super().represent_data(data)
        small = isinstance(data, list) and all(not isinstance(item, dict | list) for item in data)
        if isinstance(node, yaml.SequenceNode) and small:
            node.flow_style = True
        return node


def _represent_float(dumper: _Dumper, value: float) -> yaml.Node:
    text = repr(value)
    if text in ("inf", "-inf", "nan"):
        text = text.replace("inf", ".inf").replace("nan", ".nan")
    # PyYAML reads 1e-05 as a string, `_Loader` as a number: written so that both agree
    if "e" in text and "." not in text:
        text = text.replace("e", ".0e")
    return dumper.represent_scalar("tag:yaml.org,2002:float", text)


_Dumper.add_representer(float, _represent_float)


def write_data(data: Any) -> str:
    """Plain data as YAML; `read_document` of it gives the same."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, width=110, allow_unicode=True)
