"""Prompt templates: ensembles by name, lists of a user's, and files of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from distill_core import DataError, did_you_mean

FOLDER = Path(__file__).with_name("templates")
PLACES = ("{}", "{c}")
"""What stands for the class: ours, and that of published template files."""


def ensembles() -> list[str]:
    """The names that `templates` may be."""
    return sorted(path.stem for path in FOLDER.glob("*.txt"))


def _have_a_place(templates: str | tuple[str, ...]) -> str | tuple[str, ...]:
    if isinstance(templates, str):
        if templates.isidentifier() and templates not in ensembles():
            raise ValueError(f"no templates named {templates!r}{did_you_mean(templates, ensembles())}")
        return (templates,) if "{}" in templates else templates
    for template in templates:
        if "{}" not in template:
            raise ValueError(f"the template {template!r} has no {{}} for the class")
    return templates


Templates = Annotated[str | Annotated[tuple[str, ...], Field(min_length=1)], AfterValidator(_have_a_place)]
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
    """As `plain_lines`, without those that are empty or begin with #."""
    if not (found := [line for line in plain_lines(path, what) if line and not line.startswith("#")]):
        raise DataError(f"{path}: is empty; it should hold {what}")
    return found


def templates_of(given: str | Sequence[str]) -> list[str]:
    """The templates, with {} for the class: of an ensemble, of a file, or the list itself. Raises `DataError`."""
    if not isinstance(given, str):
        return list(given)
    path = FOLDER / f"{given}.txt" if given in ensembles() else Path(given).expanduser()
    found = read_lines(path, "a template a line, with {} for the class")
    for template in found:
        if not any(place in template for place in PLACES):
            raise DataError(f"{path}: the template {template!r} has no {{}} for the class")
    return [template.replace("{c}", "{}") for template in found]


def prompts_of(classes: Sequence[str], templates: Sequence[str]) -> list[str]:
    """All prompts of the first class, then of the second, ..."""
    return [template.replace("{}", name) for name in classes for template in templates]
