"""Prompt templates: named ensembles, a user's list, or a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from distill_core import DataError, did_you_mean

FOLDER = Path(__file__).with_name("templates")
PLACEHOLDERS = ("{}", "{c}")
"""What stands for the class: `{}`, and `{c}` in published template files."""


def ensembles() -> list[str]:
    """The names that `templates` may be."""
    return sorted(path.stem for path in FOLDER.glob("*.txt"))


def _require_placeholder(templates: str | tuple[str, ...]) -> str | tuple[str, ...]:
    if isinstance(templates, str):
        if templates.isidentifier() and templates not in ensembles():
            raise ValueError(f"no templates named {templates!r}{did_you_mean(templates, ensembles())}")
        return (templates,) if "{}" in templates else templates
    for template in templates:
        if "{}" not in template:
            raise ValueError(f"the template {template!r} has no {{}} for the class")
    return templates


Templates = Annotated[str | Annotated[tuple[str, ...], Field(min_length=1)], AfterValidator(_require_placeholder)]
"""An option for what `templates_of` takes; one template is a list of one."""


def plain_lines(path: Path, what: str) -> list[str]:
    """The lines of a UTF-8 file, up to the last that is not empty. Raises `DataError`."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").rstrip().split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise DataError(f"{path}: cannot be read ({reason}); it should hold {what}") from error
    if not any(lines):
        raise DataError(f"{path}: is empty; it should hold {what}")
    return lines


def read_lines(path: Path, what: str) -> list[str]:
    """As `plain_lines`, without empty lines and comments (#)."""
    if not (lines := [line for line in plain_lines(path, what) if line and not line.startswith("#")]):
        raise DataError(f"{path}: is empty; it should hold {what}")
    return lines


def templates_of(source: str | Sequence[str]) -> list[str]:
    """The templates, with {} for the class: of an ensemble, of a file, or the list itself. Raises `DataError`."""
    if not isinstance(source, str):
        return list(source)
    path = FOLDER / f"{source}.txt" if source in ensembles() else Path(source).expanduser()
    lines = read_lines(path, "a template a line, with {} for the class")
    for template in lines:
        if not any(place in template for place in PLACEHOLDERS):
            raise DataError(f"{path}: the template {template!r} has no {{}} for the class")
    return [template.replace("{c}", "{}") for template in lines]


def prompts_of(classes: Sequence[str], templates: Sequence[str]) -> list[str]:
    """All prompts of the first class, then of the second, ..."""
    return [template.replace("{}", name) for name in classes for template in templates]
