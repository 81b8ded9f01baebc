"""`distill new-plugin`: copies `template`, a working plugin named my-plugin, under another name.

In the template, DISTRIBUTION stands for the name of this distribution.
"""

from __future__ import annotations

import importlib.util
import keyword
import re
import sys
from collections.abc import Iterator
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from distill_core import UserError
from distill_core.tools import project


def write(name: str, into: Path) -> Path:
    """Writes the package `name` into a new folder of `into`; returns the folder. Raises `UserError`."""
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9]*([-_][A-Za-z0-9]+)*", name):
        raise UserError(f"{name!r} is no package name; use letters, digits and -, as in my-plugin")
    package = name.lower().replace("_", "-")
    module = package.replace("-", "_")
    if keyword.iskeyword(module) or module in sys.stdlib_module_names:
        raise UserError(f"{module!r} is a module or keyword of Python; choose another name")
    if importlib.util.find_spec(module) is not None:
        raise UserError(f"a module {module!r} is installed already; choose another name")
    folder = into / package
    if folder.exists():
        raise UserError(f"{folder} exists; choose another name, or --into another folder")
    for parts, file in _template(files("distill_authoring") / "template"):
        path = folder.joinpath(*(part.replace("my_plugin", module) for part in parts))
        text = file.read_text(encoding="utf-8").replace("my_plugin", module).replace("my-plugin", package)
        text = text.replace("DISTRIBUTION", project())
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error
    return folder


def _template(folder: Traversable, parents: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Traversable]]:
    """(path, file) of every file of the template."""
    for item in folder.iterdir():
        if item.is_dir() and item.name != "__pycache__":
            yield from _template(item, (*parents, item.name))
        elif item.is_file():
            yield (*parents, item.name), item
