"""Commands for who writes plugins or recipes. Nothing heavy is imported until one runs."""

from __future__ import annotations

import sys

import click

from distill_core import completion
from distill_core.without import without_option


@click.command("new-plugin")
@click.argument("name")
@click.option("--into", default=".", show_default=True, help="Folder that the package's folder is made in.")
def new_plugin(name: str, into: str) -> None:
    """Write a package with a component of each kind, its tests and a recipe, to change into your own."""
    from pathlib import Path

    from distill_core.new_plugin import write

    folder = write(name, Path(into))
    click.echo(
        f"{folder}: a plugin with one component of each kind. Next:\n"
        f"  pip install -e '{folder}[test]'\n"
        f"  pytest {folder}\n"
        f"  distill check-plugin {folder.name}\n"
        f"  distill run {folder}/recipe.yaml"
    )


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
    from distill_core.named_recipes import named_recipes

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

    from distill_core import named_recipes

    click.echo(named_recipes.copy_recipe(name, Path(file)))


@click.command("check-plugin")
@click.argument("package")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
@without_option
def check_plugin(package: str, as_json: bool) -> None:
    """Check all components of a plugin (or of a package): shapes, masks, gradients, state, ... and say what to mend.

    Exit code 1 when a check fails.
    """
    from distill_core.conformance import report

    results = report.check_package(package)
    if as_json:
        click.echo(report.as_json(results))
    else:
        report.print_results(results)
    if any(result.status == "failed" for result in results):
        sys.exit(1)


@click.command()
@without_option
def schema() -> None:
    """Print the JSON schema of recipes, with all installed components: editors complete and check YAML by it.

    distill schema > recipe.schema.json, and at the head of a recipe:

    # yaml-language-server: $schema=recipe.schema.json
    """
    import json

    from distill_core.registry import Registry
    from distill_core.schema import recipe_schema

    click.echo(json.dumps(recipe_schema(Registry.discover()), indent=1))


@click.command()
@click.argument("out")
@click.option("--plugin", help="Only the components of this plugin or package.")
@without_option
def docs(out: str, plugin: str | None) -> None:
    """Write reference pages (Markdown) of all components, sections, hooks and commands into the folder OUT."""
    from pathlib import Path

    from distill_core.reference import write

    written = write(Path(out), plugin)
    click.echo(f"{len(written)} pages in {out}")


COMMANDS = (recipes, new_plugin, check_plugin, schema, docs)
