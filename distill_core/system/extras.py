"""The name of this distribution, and its optional dependencies: imported when used, with a clear error if missing."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from distill_core.errors import UserError


@cache
def project() -> str:
    """The name that pip knows this package by, from the installed metadata. Raises `UserError`."""
    for point in entry_points(group="distill", name="core"):
        if point.value == "distill_core.contracts" and point.dist is not None:
            return point.dist.name
    raise UserError("distill is not installed, so that it has no plugins: pip install -e . in its folder")


def install(extra: str) -> str:
    """The command that installs an extra of this package."""
    return f"pip install '{project()}[{extra}]'"


def require_extra(module: str, extra: str) -> Any:
    """The module. Raises `UserError` with the extra of this package that installs it."""
    try:
        return import_module(module)
    except ImportError as error:
        raise UserError(f"this needs {module}, which cannot be imported ({error}): {install(extra)}") from error
