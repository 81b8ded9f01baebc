"""Options of several commands: `--json`, `--slurm`, and `--without NAME`, for a plugin that is broken or unwanted."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])


def without_option(command: Command) -> Command:
    """Add `--without` to the help of a command or group; its value is read earlier, by `named_without`."""
    return click.option(
        "--without",
        multiple=True,
        metavar="NAME",
        expose_value=False,
        help="Leave out this plugin (or all of a package's). Repeatable.",
    )(command)


def json_option(command: Command) -> Command:
    """Add `--json`, as `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print as JSON.")(command)


def slurm_option(command: Command) -> Command:
    """Add `--slurm`; its values are for `slurm_parameters`."""
    return click.option(
        "--slurm",
        multiple=True,
        metavar="KEY=VALUE",
        help="Submit to SLURM, with this option of submitit, as timeout_min=60. Repeatable.",
    )(command)


def slurm_parameters(options: Sequence[str]) -> dict[str, Any]:
    """The values of `--slurm`, read as YAML. Raises `UserError`."""
    from distill_core.errors import UserError
    from distill_core.recipe.document import read_document

    parameters = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals:
            raise UserError(f"--slurm {option}: write it as key=value, as timeout_min=60 or slurm_partition=gpu")
        parameters[key.strip()] = read_document(f"value: {value}", "--slurm").data["value"]
    return parameters


def named_without(arguments: Sequence[str]) -> Iterator[str]:
    """The plugins and packages that `--without` names anywhere on a command line."""
    for argument, following in pairwise([*arguments, ""]):
        if argument == "--":
            return
        if argument == "--without":
            yield following
        elif argument.startswith("--without="):
            yield argument.removeprefix("--without=")


def leave_out(context: click.Context, names: Iterator[str]) -> None:
    """Leave plugins out until the command ends."""
    from distill_core.registry import WITHOUT

    previous = os.environ.get(WITHOUT)
    left_out = [*([previous] if previous else []), *names]
    if left_out:
        os.environ[WITHOUT] = ",".join(left_out)
        context.call_on_close(lambda: _restore(WITHOUT, previous))


def _restore(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value
