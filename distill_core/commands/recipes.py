"""`distill recipes`: what recipes there are, and copies of them."""

from __future__ import annotations

import click

from distill_core.commands import completion
from distill_core.commands.options import without_option


@click.group(invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
@click.pass_context
@without_option
def recipes(ctx: click.Context, as_json: bool) -> None:
    """List the recipes and studies that plugins bring; every command that takes a recipe takes their names.

    A file of this name (NAME, or NAME.yaml in the current folder) wins over a name.
    """
    if ctx.invoked_subcommand is not None:
        return
    from distill_core.recipe.named import named_recipes

    known = named_recipes().values()
    if as_json:
        import json

        fields = ("name", "folder", "package", "about")
        rows = [{"path": str(recipe.path), **{key: getattr(recipe, key) for key in fields}} for recipe in known]
        click.echo(json.dumps(rows, indent=1))
        return
    width = max((len(recipe.name) for recipe in known), default=0)
    folder = ""
    for recipe in known:
        if recipe.folder != folder:
            folder = recipe.folder
            click.echo(f"\n{folder}/")
        click.echo(f"{recipe.name:<{width}}  {recipe.about}".rstrip())


@recipes.command("copy")
@click.argument("name", shell_complete=completion.recipe_names)
@click.argument("file")
def copy_recipe(name: str, file: str) -> None:
    """Write the recipe NAME to the new FILE (or into a folder), to change it."""
    from pathlib import Path

    from distill_core.recipe import named as named_recipes

    click.echo(named_recipes.copy_recipe(name, Path(file)))
