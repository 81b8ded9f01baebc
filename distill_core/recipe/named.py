"""Recipes that plugins provide; a command's RECIPE is a file or the name of one of them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from distill_core.errors import PluginError, RecipeErrors, UserError, did_you_mean
from distill_core.registry import Plugins

SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class NamedRecipe:
    """A recipe or study that a plugin provides; `folder` is its place below the plugin's (`studies`), or empty."""

    name: str
    path: Path
    folder: str
    package: str

    @property
    def about(self) -> str:
        """The first line of its leading comment."""
        with self.path.open(encoding="utf-8") as file:
            first = file.readline()
        return first.lstrip("# ").strip() if first.startswith("#") else ""


def named_recipes(plugins: Plugins | None = None) -> dict[str, NamedRecipe]:
    """name -> recipe, of all installed plugins, folder by folder. Raises `PluginError`, which names the package."""
    recipes: dict[str, NamedRecipe] = {}
    for plugin, package, top in (plugins or Plugins.discover()).call("distill_recipes"):
        if not Path(top).is_dir():
            raise PluginError(
                f"plugin {plugin!r} (package {package}): its folder of recipes {top} does not exist. Repair or "
                f"uninstall {package}, or add --without {plugin}."
            )
        files = [path for path in Path(top).rglob("*.yaml") if path.is_file()]
        for path in sorted(files, key=lambda path: (path.parent, path.name)):
            folder = path.parent.relative_to(top).as_posix()
            recipe = NamedRecipe(path.stem, path, "" if folder == "." else folder, package)
            other = recipes.setdefault(recipe.name, recipe)
            if other is not recipe:
                raise PluginError(
                    f"two recipes are named {recipe.name!r}: {other.path} of {other.package} and {path} of {package}. "
                    "Rename one, or add --without PACKAGE."
                )
    return recipes


def recipe_file(name: str | Path, folder: Path = Path()) -> Path:
    """The file that `name` stands for: itself or NAME.yaml in `folder` where there is one, else a recipe's by its name.

    What looks like a path (with a suffix, or a folder) is returned whether or not it exists. Raises `RecipeErrors`.
    """
    text = os.fspath(name)
    path = folder / text
    if path.is_file():
        return path
    is_path = path.suffix in SUFFIXES or Path(text).name != text
    if not is_path and (neighbour := folder / f"{text}.yaml").is_file():
        return neighbour
    recipes = named_recipes()
    if not is_path and text in recipes:
        return recipes[text].path
    if not is_path:
        hint = did_you_mean(text, sorted({*recipes, *(other.stem for other in folder.glob("*.yaml"))}))
        if not hint.endswith("?"):  # a list of all names would be long
            hint = "; `distill recipes` lists the names"
        raise RecipeErrors([f"{text}: no such file, and no recipe of this name{hint}"])
    if path.stem in recipes:
        hint = (
            f"there is a recipe of this name: write {path.stem}, or copy it with distill recipes copy {path.stem} FILE"
        )
        raise RecipeErrors([f"{path}: no such file; {hint}"])
    return path


def copy_recipe(name: str, target: Path) -> Path:
    """Writes the recipe `name` to a new file, or into a folder as NAME.yaml; returns the file. Raises `UserError`."""
    recipes = named_recipes()
    if name not in recipes:
        raise UserError(f"no recipe is named {name!r}{did_you_mean(name, list(recipes))}")
    file = target / f"{name}.yaml" if target.is_dir() else target
    try:
        with file.open("x", encoding="utf-8") as output:
            output.write(recipes[name].path.read_text(encoding="utf-8"))
    except FileExistsError:
        raise UserError(f"{file} exists; choose another name") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be written: {error.strerror or error}") from error
    return file
