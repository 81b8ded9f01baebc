"""What a recipe costs before it runs, and where the time of its steps goes."""

import click

from distill_core import hookimpl

distill_api = 2


@hookimpl
def distill_commands() -> list[click.Command]:
    """`distill plan` and `distill profile`."""
    from distill_scale.commands import plan, profile

    return [plan, profile]
