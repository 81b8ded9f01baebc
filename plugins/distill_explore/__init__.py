"""Exploring a trained run: embed a collection, search it, and see what the model attends to."""

import click

from distill_core import hookimpl

distill_api = 2


@hookimpl
def distill_components() -> list[type]:
    """Attention maps while training."""
    from distill_explore.maps import AttentionMaps

    return [AttentionMaps]


@hookimpl
def distill_commands() -> list[click.Command]:
    """`distill embed`, `distill search` and `distill attend`."""
    from distill_explore.attend import attend
    from distill_explore.commands import embed, search

    return [embed, search, attend]
