"""What the shell completes. Nothing here imports torch: component names and options come from a small file in the
cache, which every command that loads the components anyway keeps up to date.
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
from distill_core.system.files import cache_folder

if TYPE_CHECKING:
    import click

    from distill_core.registry import Registry


def recipes(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """YAML files, here and one folder below, and the names of recipes that plugins bring."""
    if has_magic(incomplete):
        return []
    return [
        *sorted({*glob(f"{incomplete}*.yaml"), *glob(f"{incomplete}*/*.yaml")}),
        *recipe_names(ctx, param, incomplete),
    ]


def recipe_names(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Names of recipes that plugins bring."""
    from distill_core.recipe.named import named_recipes

    with suppress(UserError):  # a plugin that is broken: the command says so
        return sorted(name for name in named_recipes() if name.startswith(incomplete))
    return []


def run_folders(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Folders that hold a run, here and one folder below."""
    if has_magic(incomplete):
        return []
    found = {*glob(f"{incomplete}*/recipe.yaml"), *glob(f"{incomplete}*/*/recipe.yaml")}
    return sorted(os.path.dirname(path) for path in found)


def checkpoints(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """`last`, `best` and the steps that the run has kept."""
    folder = Path(_given(ctx) or ".", "checkpoints")
    steps = sorted(int(number) for path in folder.glob("step-*.pt") if (number := path.stem[5:]).isdecimal())
    best = ["best"] if (folder / "best.pt").is_file() else []
    return [name for name in ("last", *best, *map(str, steps)) if name.startswith(incomplete)]


def components(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Names of components."""
    return sorted(name for name in _remembered()["options"] if name.startswith(incomplete))


def set_paths(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Paths of `--set`: a recipe's own, its components' options, and the sections'."""
    if "=" in incomplete:
        return []
    known = _remembered()
    found = set(known["sections"])
    if (given := _given(ctx)) is not None:
        from distill_core.recipe.document import read_document
        from distill_core.recipe.named import recipe_file

        with suppress(OSError, UnicodeDecodeError, UserError):  # a recipe that is being written has nothing to offer
            file = Path(given, "recipe.yaml") if Path(given).is_dir() else recipe_file(given)
            found |= set(_paths(read_document(file.read_text(encoding="utf-8"), str(file)).data, known["options"]))
    return sorted(path for path in found if path.startswith(incomplete))


def _given(ctx: click.Context) -> str | None:
    """The recipe or run folder of the command line so far: the command's first argument."""
    for parameter in ctx.command.params:
        if parameter.param_type_name == "argument" and (value := ctx.params.get(parameter.name or "")):
            return str(value[0] if isinstance(value, tuple) else value)
    # click assigns no arguments while the value of the last option is missing
    return ctx.args[0] if ctx.args else None


def _paths(node: Any, options: dict[str, list[str]], above: str = "") -> Iterator[str]:
    if isinstance(node, dict):
        more = options.get(node["name"], []) if isinstance(node.get("name"), str) and above else []
        below = {**dict.fromkeys(more), **{str(key): value for key, value in node.items()}}
    elif isinstance(node, list):
        below = {str(i): value for i, value in enumerate(node) if isinstance(value, dict | str)}
    else:
        return
    for key, value in below.items():
        yield above + key
        yield from _paths(value, options, f"{above}{key}.")


def remember(registry: Registry) -> None:
    """Keep the names of components and options for `components` and `set_paths`; only where they have changed."""
    from pydantic import BaseModel

    from distill_core.recipe.sections import Recipe

    def paths(model: type[BaseModel], above: str = "") -> Iterator[str]:
        for name, field in model.model_fields.items():
            yield above + (field.alias or name)
            for inner in (field.annotation, *typing.get_args(field.annotation)):
                if isinstance(inner, type) and issubclass(inner, BaseModel):
                    yield from paths(inner, f"{above}{name}.")

    options: dict[str, set[str]] = {}
    for entry in registry.entries.values():
        fields = entry.cls.Config.model_fields
        options.setdefault(entry.cls.name, set()).update(field.alias or name for name, field in fields.items())
    known = {"options": {name: sorted(names) for name, names in options.items()}, "sections": [*paths(Recipe)]}
    text, file = json.dumps(known, sort_keys=True), _file()
    with suppress(OSError):  # a cache that cannot be written to must not keep anybody from training
        if file.is_file() and file.read_text(encoding="utf-8") == text:
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(f".{os.getpid()}")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(file)


def _file() -> Path:
    """One a Python installation: another has other plugins."""
    return cache_folder() / f"completion-{blake2b(sys.prefix.encode(), digest_size=6).hexdigest()}.json"


def _remembered() -> dict[str, Any]:
    try:
        known: dict[str, Any] = json.loads(_file().read_text(encoding="utf-8"))
        return {"options": known["options"], "sections": known["sections"]}
    except (OSError, ValueError, KeyError, TypeError):  # nothing has been loaded yet here
        return {"options": {}, "sections": []}
