"""Commands for authors of plugins and recipes. Nothing heavy is imported until one runs."""

from __future__ import annotations

import sys

import click

from distill_core.tools import without_option


@click.command("new-plugin")
@click.argument("name")
@click.option("--into", default=".", show_default=True, help="Folder in which the package's folder is created.")
def new_plugin(name: str, into: str) -> None:
    """Write a package with a component of each kind, tests and a recipe, as a start for your own."""
    from pathlib import Path

    from distill_authoring.new_plugin import write

    folder = write(name, Path(into))
    click.echo(
        f"{folder}: a plugin with one component of each kind. Next:\n"
        f"  pip install -e '{folder}[test]'\n"
        f"  pytest {folder}\n"
        f"  distill check-plugin {folder.name}\n"
        f"  distill run {folder}/recipe.yaml"
    )


@click.command("check-plugin")
@click.argument("package")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
@without_option
def check_plugin(package: str, as_json: bool) -> None:
    """Check all components of a plugin or package (shapes, masks, gradients, state, ...) and say what to fix.

    Exit code 1 when a check fails.
    """
    from distill_authoring.conformance import report

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
    """Print the JSON schema of recipes, with all installed components, for editors that complete and check YAML.

    distill schema > recipe.schema.json, then at the top of a recipe:

    # yaml-language-server: $schema=recipe.schema.json
    """
    import json

    from distill_authoring.schema import recipe_schema
    from distill_core.tools import Registry

    click.echo(json.dumps(recipe_schema(Registry.discover()), indent=1))


@click.command()
@click.argument("out")
@click.option("--plugin", help="Only the components of this plugin or package.")
@without_option
def docs(out: str, plugin: str | None) -> None:
    """Write reference pages (Markdown) of all components, sections, hooks and commands into the folder OUT."""
    from pathlib import Path

    from distill_authoring.reference import write

    written = write(Path(out), plugin)
    click.echo(f"{len(written)} pages in {out}")
