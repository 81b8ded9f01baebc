"""A data set from outside: look at it, pack it into shards, join something new to it, index it."""

import click

from distill_core import hookimpl

distill_api = 2


@hookimpl
def distill_commands() -> list[click.Command]:
    """`distill data`: a group that other plugins may extend."""
    from distill_data.commands import data

    return [data]
