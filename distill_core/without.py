"""`--without NAME`: go on without a plugin that is broken, too old or unwanted."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])


def without_option(command: Command) -> Command:
    """Adds the option to a command (or group)."""
    return click.option(
        "--without",
        multiple=True,
        metavar="NAME",
        expose_value=False,
        is_eager=True,
        callback=_leave_out,
        help="Go on without this plugin (or all of a package's). Repeatable.",
    )(command)


def _leave_out(context: click.Context, option: click.Parameter, names: tuple[str, ...]) -> None:
    from distill_core.registry import WITHOUT

    if names:
        before = os.environ.get(WITHOUT)
        os.environ[WITHOUT] = ",".join([*([before] if before else []), *names])
        context.call_on_close(lambda: _restore(WITHOUT, before))


def _restore(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value
