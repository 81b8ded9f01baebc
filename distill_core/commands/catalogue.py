"""The output of `distill plugins`: components, and a component's options."""

from __future__ import annotations

import inspect
import json
import types
import typing
from itertools import groupby
from typing import Any

from pydantic import BaseModel
from pydantic_core import to_jsonable_python
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from distill_core.contracts.schedule import Schedule, Scheduled
from distill_core.contracts.slot import Slot, default_of, interfaces_of
from distill_core.errors import UserError, did_you_mean
from distill_core.registry import Entry, Registry
from distill_core.system.extras import project


def options(config: type[BaseModel]) -> list[dict[str, Any]]:
    """name, type, default (None where required) and doc of each option; an option's own options come after it."""
    rows = []
    for name, field in config.model_fields.items():
        default = default_of(field)
        default = default.dump() if isinstance(default, Scheduled) else default
        rows.append(
            {
                "name": field.alias or name,
                "type": type_name(field.annotation),
                "required": field.is_required(),
                "default": to_jsonable_python(default),
                "doc": " ".join((field.description or "").split()),
            }
        )
        for part in (field.annotation, *typing.get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                rows += [row | {"name": f"{field.alias or name}.{row['name']}"} for row in options(part)]
    return rows


def type_name(annotation: Any) -> str:
    """A type in readable form: `int`, `[float, float]`, `'a' | 'b'`."""
    if annotation is None or annotation is type(None):
        return "null"
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return type_name(arguments[0])
    if origin is Scheduled:
        return f"{type_name(arguments[0])} | {Schedule.kind}"
    if origin is typing.Literal:
        return " | ".join(repr(value) for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(type_name(argument) for argument in arguments)
    if origin is tuple:
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return f"[{type_name(arguments[0])}, ...]"
        return f"[{', '.join(type_name(argument) for argument in arguments)}]"
    if origin is Slot:
        return " | ".join(interface.kind for interface in interfaces_of(annotation))
    if origin is dict:
        return f"{{{type_name(arguments[0])}: {type_name(arguments[1])}}}"
    if origin is list:
        return f"[{type_name(arguments[0])}, ...]"
    return getattr(annotation, "__name__", str(annotation))


def summary(cls: type) -> str:
    """The first paragraph of a class's docstring, in one line."""
    return " ".join(inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0].split())


def _entries(registry: Registry, name: str | None) -> list[Entry]:
    kinds = list(registry.interfaces)
    if name is None:
        return sorted(registry.entries.values(), key=lambda entry: (kinds.index(entry.cls.kind), entry.cls.name))
    entries = registry.named(name)
    if not entries:
        raise UserError(f"no component named {name!r}{did_you_mean(name, [other for _, other in registry.entries])}")
    return entries


def as_json(registry: Registry, name: str | None) -> str:
    """The components, with options, as JSON."""
    return json.dumps(
        [
            {
                "kind": entry.cls.kind,
                "name": entry.cls.name,
                "package": entry.package,
                "plugin": entry.plugin,
                "class": f"{entry.cls.__module__}.{entry.cls.__qualname__}",
                "doc": inspect.cleandoc(entry.cls.__doc__ or ""),
                "options": options(entry.cls.Config),
            }
            for entry in _entries(registry, name)
        ],
        indent=1,
    )


def print_all(registry: Registry) -> None:
    """Every component: on a terminal by kind, wrapped; piped, a line each with its package."""
    console = Console(soft_wrap=True)
    rows = [(e.cls.kind, e.cls.name, e.package, summary(e.cls)) for e in _entries(registry, None)]
    if console.is_terminal:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
        table.add_column(no_wrap=True)
        table.add_column()
        for kind, of_kind in groupby(rows, key=lambda row: row[0]):
            table.add_row(f"[bold]{kind}[/bold]")
            for _, name, package, text in of_kind:
                origin = "" if package == project() else f" ({package})"
                table.add_row(f"  {name}", escape(text + origin))
        console.print(table, highlight=False, soft_wrap=False)
        return
    rows.insert(0, ("kind", "name", "package", ""))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for row in rows:
        line = "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]])
        console.print(line.rstrip(), highlight=False, markup=False)


def print_one(registry: Registry, name: str) -> None:
    """A component's documentation and options."""
    console = Console()
    for entry in _entries(registry, name):
        head = f"{entry.cls.name}  ({entry.cls.kind}, plugin {entry.plugin} of {entry.package})"
        console.print(head, highlight=False, markup=False)
        console.print(inspect.cleandoc(entry.cls.__doc__ or ""), highlight=False, markup=False)
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("option", no_wrap=True)
        for column in ("type", "default", ""):
            table.add_column(column, overflow="fold")
        for row in options(entry.cls.Config):
            default = "required" if row["required"] else json.dumps(row["default"])
            table.add_row(row["name"], escape(row["type"]), escape(default), escape(row["doc"]))
        console.print()
        console.print(table if table.row_count else "(no options)", highlight=False)
