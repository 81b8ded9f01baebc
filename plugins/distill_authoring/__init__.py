"""For authors of plugins and recipes: `new-plugin`, `check-plugin`, the JSON schema of recipes, reference pages."""

import click

from distill_core import hookimpl

distill_api = 2


@hookimpl
def distill_commands() -> list[click.Command]:
    """`distill new-plugin`, `check-plugin`, `schema` and `docs`."""
    from distill_authoring.commands import check_plugin, docs, new_plugin, schema

    return [new_plugin, check_plugin, schema, docs]
