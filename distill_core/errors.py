"""Errors that a user can fix. The command line prints them as they are, without a traceback."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import click

KeyPath = tuple[str | int, ...]
"""A place in a document, as `("loss", 1, "weight")`; errors are reported with it."""


class UserError(Exception):
    """One clear line: what is wrong, where, and what to do next. Exit code 2."""

    exit_code = 2
    everywhere = False
    """Whether every rank meets it alike, so that the first one alone says it."""


class RecipeErrors(UserError):
    """All that is wrong with one recipe, a line each."""

    everywhere = True

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__("\n".join(lines))
        self.lines = list(lines)


class DataError(UserError):
    """Shards that are missing, empty or not readable, or data with no usable sample."""


class PluginError(UserError):
    """A plugin that cannot be used; the message names its package."""

    everywhere = True


class TrainingStopped(UserError):
    """Training cannot continue (a loss that is not finite). Exit code 3."""

    exit_code = 3
    everywhere = True


class OtherRankFailed(UserError):
    """A run's other rank met an error, or has ended. Exit code 4."""

    exit_code = 4

    def __init__(self, line: str, *, speaks: bool = True) -> None:
        super().__init__(line)
        self.speaks = speaks
        """Whether this rank is the one to say it, of all those that end of it."""


class StopRun(Exception):
    """Raised by a callback of `distill_core.fit`: the run is saved after the step under way, and ends with this
    message. `distill resume` continues it."""


class BadSample(Exception):
    """Raised while a sample is read or augmented: the sample is skipped, counted, and named in the log."""


class AbsentModality(BadSample):
    """Raised by an augmentation whose modality the sample does not have at all, as opposed to one that is unusable.

    Where the recipe says that the modality may be absent (`data.optional`), the sample is trained on without it.
    """


def warn(line: str) -> None:
    """Say it on standard error, where no display does."""
    click.echo(f"warning: {line}", err=True)


def counted(count: int, one: str, many: str | None = None) -> str:
    """`1 sample`, `2 samples`; `many` where that is not `one` with an s."""
    return f"{count} {one if count == 1 else many or one + 's'}"


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """`, did you mean 'x'?`, or the known words where none is near."""
    near = get_close_matches(word, known, n=1, cutoff=0.6)
    if near:
        return f", did you mean {near[0]!r}?"
    return f" (there are: {', '.join(sorted(known))})" if known else ""


_OPTION_MESSAGES = {
    "bool_type": "must be true or false",
    "dict_type": "must be a mapping",
    "finite_number": "must be finite",
    "float_type": "must be a number",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "int_from_float": "must be an integer",
    "int_type": "must be an integer",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "list_type": "must be a list",
    "literal_error": "must be {expected}",
    "missing": "is required and not given",
    "model_type": "must be a mapping",
    "string_pattern_mismatch": "must match the pattern {pattern!r}",
    "string_type": "must be a string",
    "too_long": "must have at most {max_length} item(s), not {actual_length}",
    "too_short": "must have at least {min_length} item(s), not {actual_length}",
    "tuple_type": "must be a list",
}


def option_message(error: Mapping[str, Any]) -> str:
    """What is wrong with an option's value, from an item of pydantic's `ValidationError.errors()`."""
    context = {
        name: int(value) if isinstance(value, float) and value.is_integer() else value
        for name, value in (error.get("ctx") or {}).items()
    }
    message = _OPTION_MESSAGES.get(error["type"])
    if message is None or ("{" in message and not context):  # our own error, or one that is translated already
        return str(error["msg"]).removeprefix("Value error, ")
    return message.format(**context)
