"""Ablation studies: variants of a recipe, each trained with several seeds, and the table of what they change."""

import click

from distill_core import hookimpl

distill_api = 2


@hookimpl
def distill_commands() -> list[click.Command]:
    """`distill ablate` and `distill compare`."""
    from distill_study.commands import ablate, compare

    return [ablate, compare]
