"""Optional packages: imported when they are used, with one clear line where they are missing."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from distill_core.errors import UserError


def need(module: str, extra: str) -> Any:
    """The module. Raises `UserError` with the extra of this package that installs it."""
    try:
        return import_module(module)
    except ImportError as error:
        raise UserError(
            f"this needs {module}, which cannot be imported ({error}): pip install 'distill-framework[{extra}]'"
        ) from error
