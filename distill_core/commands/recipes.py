"""`distill recipes`: lists recipes, and copies them."""

from __future__ import annotations

import json

import click

from distill_core.commands import completion
from distill_core.commands.options import json_option, without_option


@click.group(invoke_without_command=True)
@json_option
@click.pass_context
@without_option
def recipes(ctx: click.Context, as_json: bool) -> None:
    """List the recipes and studies of the installed plugins. Every command that takes a recipe accepts their names.

    A file NAME or NAME.yaml in the current folder takes precedence over the recipe of that name.
    """
    if ctx.invoked_subcommand is not None:
        return
    from distill_core.recipe.named import named_recipes

    entries = named_recipes().values()
    if as_json:
        fields = ("name", "folder", "package", "about")
        rows = [{"path": str(recipe.path), **{key: getattr(recipe, key) for key in fields}} for recipe in entries]
        click.echo(json.dumps(rows, indent=1))
        return
    width = max((len(recipe.name) for recipe in entries), default=0)
    folder = ""
    for recipe in entries:
        if recipe.folder != folder:
            folder = recipe.folder
            click.echo(f"\n{folder}/")
        click.echo(f"{recipe.name:<{width}}  {recipe.about}".rstrip())


@recipes.command("copy")
@click.argument("name", shell_complete=completion.recipe_names)
@click.argument("file")
def copy_recipe(name: str, file: str) -> None:
    """Copy the recipe NAME to a new FILE (or into a folder), for you to change."""
    from pathlib import Path

    from distill_core.recipe import named as named_recipes

    click.echo(named_recipes.copy_recipe(name, Path(file)))
