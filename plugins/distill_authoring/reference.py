"""Reference pages in Markdown, generated from the docstrings and options of the installed components."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
import textwrap
import typing
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
from pydantic import BaseModel

import distill_core
from distill_core import Component, ComponentConfig, Loss, UserError, did_you_mean
from distill_core.tools import Entry, Plugins, Recipe, Registry, catalogue, hookspecs


def write(out: Path, plugin: str | None = None) -> list[Path]:
    """Writes the pages into the folder `out`, or only those of one plugin or package. Raises `UserError`."""
    plugins = Plugins.discover()
    registry = Registry.discover(plugins)
    texts = pages(registry, plugins) if plugin is None else component_pages(_only(registry, plugin), registry)
    paths = []
    for name, text in texts.items():
        path = out / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
        paths.append(path)
    return paths


def pages(registry: Registry, plugins: Plugins) -> dict[str, str]:
    """Path -> Markdown: an index, a page for each component, the recipe's sections, the interfaces, what components are
    given and return, the commands."""
    return {
        **component_pages(registry.entries.values(), registry),
        "recipe.md": _recipe(),
        "interfaces.md": _interfaces(registry),
        "data_types.md": _data_types(),
        "commands.md": _commands(plugins),
    }


def component_pages(entries: Iterable[Entry], registry: Registry) -> dict[str, str]:
    """The index and a page for each component."""
    kinds = list(registry.interfaces)
    entries = sorted(entries, key=lambda entry: (kinds.index(entry.cls.kind), entry.cls.name))
    rows = [
        (
            entry.cls.kind,
            f"[{entry.cls.name}]({entry.cls.kind}/{entry.cls.name}.md)",
            entry.package,
            catalogue.summary(entry.cls),
        )
        for entry in entries
    ]
    texts = {"index.md": "# Components\n\n" + _table(("kind", "name", "package", ""), rows)}
    for entry in entries:
        texts[f"{entry.cls.kind}/{entry.cls.name}.md"] = _component(entry, registry.interfaces[entry.cls.kind])
    return texts


def _only(registry: Registry, plugin: str) -> list[Entry]:
    entries = [entry for entry in registry.entries.values() if plugin in (entry.plugin, entry.package)]
    if not entries:
        names = sorted({name for entry in registry.entries.values() for name in (entry.plugin, entry.package)})
        raise UserError(f"no plugin or package {plugin!r} with components{did_you_mean(plugin, names)}")
    return entries


def _component(entry: Entry, interface: type[Component]) -> str:
    cls = entry.cls
    parts = [
        f"# {cls.name}",
        f"A component of kind [{cls.kind}](../interfaces.md#{cls.kind}), of the plugin `{entry.plugin}` "
        f"(package {entry.package}).",
        _section(cls),
        "## Options",
    ]
    has_config = cls.Config not in (ComponentConfig, interface.Config)
    about = vars(cls.Config).get("__doc__") if has_config else None
    parts += [inspect.cleandoc(about)] if about else []
    parts += list(_options(cls.Config)) or ["It has no options."]
    examples = [example for example in cls.examples if example]
    if examples:
        lines = "\n".join(json.dumps({"name": cls.name, **example}) for example in examples)
        parts += [
            "## Example options",
            f"Small configurations that `distill check-plugin` builds:\n\n```yaml\n{lines}\n```",
        ]
    if isinstance(cls, type) and issubclass(cls, Loss) and cls.teacher_modules:
        parts.append(f"The teacher keeps an average of: {', '.join(cls.teacher_modules)}.")
    methods = [
        f"`{name}`: {' '.join(inspect.cleandoc(method.__doc__).split())}"
        for name, method in _methods(cls)
        if method.__doc__
    ]
    parts += ["## Notes", "\n".join(f"- {line}" for line in methods)] if methods else []
    parts.append(f"Source: `{cls.__module__}.{cls.__qualname__}`.")
    return _joined(parts)


def _recipe() -> str:
    parts = ["# Recipe", _doc(Recipe), "The sections and their options. A component is written as `{name: NAME, ...}`."]
    return _joined([*parts, *_options(Recipe)])


def _interfaces(registry: Registry) -> str:
    parts = ["# Interfaces and hooks", _doc(hookspecs), "## Hooks"]
    for name, hook in vars(hookspecs).items():
        if name.startswith("distill_"):
            parts += [f"### {name}", _doc(hook)]
    parts += ["## Every component", _doc(Component)]
    parts.append(_listed(Component))
    for kind, interface in registry.interfaces.items():
        parts += [f"## {kind}", f"`{interface.__module__}.{interface.__name__}`", _section(interface)]
        parts.append(_listed(interface))
    return _joined(parts)


def _data_types() -> str:
    parts = [
        "# Data types",
        "The classes that components are given, return and raise, and the functions that they may call, beside the "
        "[interfaces](interfaces.md). All are imported from `distill_core`.",
    ]
    public = {name: getattr(distill_core, name) for name in sorted(distill_core.HOMES, key=str.lower)}
    for name, cls in public.items():
        if isinstance(cls, type) and not issubclass(cls, Component | ComponentConfig):
            rows = list(_attributes(cls))
            parts += [f"## {name}", _section(cls)]
            parts += [_table(("attribute", "type", ""), rows) if rows else "", _listed(cls)]
    lines = [f"- `{name}{_signature(f)}`: {_line(f)}" for name, f in public.items() if inspect.isfunction(f)]
    return _joined([*parts, "## Functions", "\n".join(lines)])


def _attributes(cls: type) -> Iterator[tuple[str, str, str]]:
    """(name, type, doc) of a dataclass's fields, and of any class's properties."""
    if dataclasses.is_dataclass(cls):
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
        assert isinstance(tree, ast.ClassDef)
        docs = {
            ast.unparse(one.target): ast.literal_eval(after.value)
            for one, after in pairwise(tree.body)
            if isinstance(one, ast.AnnAssign) and isinstance(after, ast.Expr)
        }
        for field in dataclasses.fields(cls):
            if not field.name.startswith("_"):
                yield f"`{field.name}`", f"`{field.type}`", docs.get(field.name, "")
    for name, member in vars(cls).items():
        if isinstance(member, property) and not name.startswith("_"):
            yield f"`{name}`", f"`{member.fget.__annotations__['return']}`", _doc(member)


def _listed(cls: type) -> str:
    return "\n".join(f"- `{name}{_signature(method)}`: {_line(method)}" for name, method in _methods(cls))


def _commands(plugins: Plugins) -> str:
    from distill_core.tools import cli

    parts = ["# Commands", inspect.cleandoc(cli.help or "")]
    commands = dict([*_walk(cli.commands.values()), *_walk(plugins.commands())])  # plugins share groups
    for name, command in sorted(commands.items()):
        usage = " ".join(_usage(parameter) for parameter in command.params if isinstance(parameter, click.Argument))
        call = f"`distill {name} {usage}".rstrip() + "`"
        parts += [f"## distill {name}", call, inspect.cleandoc(command.help or "")]
        rows = [
            (f"`{', '.join(option.opts)}`", option.help or "")
            for option in command.params
            if isinstance(option, click.Option)
        ]
        parts += [_table(("option", ""), rows)] if rows else []
    return _joined(parts)


def _walk(commands: Iterable[click.Command], prefix: str = "") -> Iterator[tuple[str, click.Command]]:
    for command in commands:
        name = f"{prefix}{command.name}"
        yield name, command
        if isinstance(command, click.Group):
            yield from _walk(command.commands.values(), f"{name} ")


def _usage(argument: click.Argument) -> str:
    name = (argument.name or "").upper()
    return f"{name}..." if argument.nargs == -1 else name


def _options(config: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """A table of a config's options, and one for each config that they nest."""
    rows = [
        (
            f"`{prefix}{row['name']}`",
            f"`{row['type']}`",
            "required" if row["required"] else f"`{json.dumps(row['default'], default=_plain)}`",
            row["doc"],
        )
        for row in catalogue.options(config)
    ]
    if rows:
        yield _table(("option", "type", "default", ""), rows)
    for name, field in config.model_fields.items():
        for inner in configs(field.annotation):
            title = f"{prefix}{field.alias or name}"
            yield from (f"### {title}", _doc(inner), *_options(inner, f"{title}."))


def configs(annotation: Any) -> list[type[BaseModel]]:
    """The configs that an option's type nests."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [config for argument in typing.get_args(annotation) for config in configs(argument)]


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else str(value)


def _methods(cls: type) -> Iterator[tuple[str, Any]]:
    """(name, function) of the public methods that a class defines itself."""
    for name, member in vars(cls).items():
        method = getattr(member, "__func__", member)
        if not name.startswith("_") and inspect.isfunction(method):
            yield name, method


def _signature(method: Any) -> str:
    names = [name for name in inspect.signature(method).parameters if name not in ("self", "cls")]
    return f"({', '.join(names)})"


def _line(method: Any) -> str:
    return " ".join(_doc(method).split())


def _doc(thing: Any) -> str:
    return inspect.cleandoc(thing.__doc__ or "")


def _section(thing: Any) -> str:
    """The docstring, its paragraphs of aligned columns (shapes) as they stand."""
    paragraphs = _doc(thing).split("\n\n")
    return "\n\n".join(f"```text\n{p}\n```" if re.search(r"\S {2,}\S", p) else p for p in paragraphs)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    cells = [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _joined(parts: Iterable[str]) -> str:
    return "\n\n".join(part for part in parts if part) + "\n"
