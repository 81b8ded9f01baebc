"""Shell completion. Nothing here imports torch: component names and options come from a small cache file, which every
command that loads the components updates.
"""

from __future__ import annotations

import json
import os
import sys
import typing
from collections.abc import Iterator
from contextlib import suppress
from glob import glob, has_magic
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_core.errors import UserError
from distill_core.system.files import cache_folder, write_whole

if TYPE_CHECKING:
    import click

    from distill_core.registry import Registry


def recipes(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """YAML files in the current folder and one level below, and the names of recipes that plugins provide."""
    if has_magic(incomplete):
        return []
    return [
        *sorted({*glob(f"{incomplete}*.yaml"), *glob(f"{incomplete}*/*.yaml")}),
        *recipe_names(ctx, param, incomplete),
    ]


def recipe_names(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Names of recipes that plugins provide."""
    from distill_core.recipe.named import named_recipes

    with suppress(UserError):  # a plugin that is broken: the command says so
        return sorted(name for name in named_recipes() if name.startswith(incomplete))
    return []


def run_folders(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Run folders in the current folder and one level below."""
    if has_magic(incomplete):
        return []
    recipes = {*glob(f"{incomplete}*/recipe.yaml"), *glob(f"{incomplete}*/*/recipe.yaml")}
    return sorted(os.path.dirname(path) for path in recipes)


def checkpoints(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """`last`, `best` and the steps of the run's checkpoints."""
    folder = Path(_first_argument(ctx) or ".", "checkpoints")
    steps = sorted(int(number) for path in folder.glob("step-*.pt") if (number := path.stem[5:]).isdecimal())
    best = ["best"] if (folder / "best.pt").is_file() else []
    return [name for name in ("last", *best, *map(str, steps)) if name.startswith(incomplete)]


def components(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Names of components, for `distill plugins`."""
    return sorted(name for name in _read_cache()["options"] if name.startswith(incomplete))


def set_paths(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Paths of `--set`: a recipe's own, its components' options, and the sections'."""
    if "=" in incomplete:
        return []
    cached = _read_cache()
    paths = set(cached["sections"])
    if (argument := _first_argument(ctx)) is not None:
        from distill_core.recipe.document import read_document
        from distill_core.recipe.named import recipe_file

        with suppress(OSError, UnicodeDecodeError, UserError):  # a recipe that is being written has nothing to offer
            file = Path(argument, "recipe.yaml") if Path(argument).is_dir() else recipe_file(argument)
            paths |= set(_paths(read_document(file.read_text(encoding="utf-8"), str(file)).data, cached["options"]))
    return sorted(path for path in paths if path.startswith(incomplete))


def _first_argument(ctx: click.Context) -> str | None:
    """The recipe or run folder of the command line so far: the command's first argument."""
    for parameter in ctx.command.params:
        if parameter.param_type_name == "argument" and (value := ctx.params.get(parameter.name or "")):
            return str(value[0] if isinstance(value, tuple) else value)
    # click assigns no arguments while the value of the last option is missing
    return ctx.args[0] if ctx.args else None


def _paths(node: Any, options: dict[str, list[str]], prefix: str = "") -> Iterator[str]:
    if isinstance(node, dict):
        names = options.get(node["name"], []) if isinstance(node.get("name"), str) and prefix else []
        children = {**dict.fromkeys(names), **{str(key): value for key, value in node.items()}}
    elif isinstance(node, list):
        children = {str(i): value for i, value in enumerate(node) if isinstance(value, dict | str)}
    else:
        return
    for key, value in children.items():
        yield prefix + key
        yield from _paths(value, options, f"{prefix}{key}.")


def update_cache(registry: Registry) -> None:
    """Write the names of components and options for `components` and `set_paths` to the cache, if they have changed."""
    from pydantic import BaseModel

    from distill_core.contracts.slot import Unnamed
    from distill_core.recipe.sections import Recipe

    def paths(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
        for name, field in model.model_fields.items():
            yield prefix + (field.alias or name)
            for mark in field.metadata:
                if isinstance(mark, Unnamed):
                    yield from (f"{prefix}{name}.{option}" for option in options.get(mark.name, ()))
            for inner in (field.annotation, *typing.get_args(field.annotation)):
                if isinstance(inner, type) and issubclass(inner, BaseModel):
                    yield from paths(inner, f"{prefix}{name}.")

    options: dict[str, set[str]] = {}
    for entry in registry.entries.values():
        fields = entry.cls.Config.model_fields
        options.setdefault(entry.cls.name, set()).update(field.alias or name for name, field in fields.items())
    content = {"options": {name: sorted(names) for name, names in options.items()}, "sections": sorted(paths(Recipe))}
    text, file = json.dumps(content, sort_keys=True), _file()
    with suppress(OSError):  # an unwritable cache must not prevent training
        if file.is_file() and file.read_text(encoding="utf-8") == text:
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, text)


def _file() -> Path:
    """The cache file; one per Python installation, since each has its own plugins."""
    return cache_folder() / f"completion-{blake2b(sys.prefix.encode(), digest_size=6).hexdigest()}.json"


def _read_cache() -> dict[str, Any]:
    try:
        cached: dict[str, Any] = json.loads(_file().read_text(encoding="utf-8"))
        return {"options": cached["options"], "sections": cached["sections"]}
    except (OSError, ValueError, KeyError, TypeError):  # not written yet
        return {"options": {}, "sections": []}
