"""What a person does with a trained run: embed a collection, and search it."""

import click

from distill_core import hookimpl

distill_api = 1


@hookimpl
def distill_commands() -> list[click.Command]:
    """`distill embed` and `distill search`."""
    from distill_explore.commands import embed, search

    return [embed, search]
