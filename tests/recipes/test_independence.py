"""Methods are independent in YAML as in imports: a recipe names its own method's package, what is shared, and the
methods that it is composed of. Removing a method breaks its own recipes, and those of no other."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from distill_core.cli import main
from distill_core.errors import RecipeErrors
from distill_core.recipe.document import read_document
from distill_core.recipe.resolve import load_recipe
from distill_core.registry import WITHOUT, Registry
from distill_study.grammar import make_study
from distill_study.plan import check_study

ROOT = Path(__file__).parents[2]
RECIPES = sorted(file for file in (ROOT / "recipes").rglob("*.yaml") if file.parent.name != "studies")
STUDIES = sorted((ROOT / "recipes" / "studies").glob("*.yaml"))
PLUGINS = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["distill"])

METHODS = {
    "clip": {"clip"},
    "clipself": {"clipself"},
    "coca": {"coca", "clip"},
    "cosmos": {"cosmos"},
    "data2vec": {"data2vec"},
    "dino": {"dino"},
    "dreamlip": {"dreamlip"},
    "flair": {"flair"},
    "flava": {"flava", "clip"},
    "gram": {"dino"},
    "ibot": {"dino"},
    "ijepa": {"ijepa"},
    "lejepa": {"lejepa"},
    "lit": {"clip", "pretrained"},
    "mobileclip": {"mobileclip", "tips"},
    "siglip": {"siglip"},
    "siglip2": {"siglip", "dino"},
    "silc": {"dino"},
    "slip": {"slip", "clip"},
    "speech": {"speech", "clip"},
    "tips": {"tips", "dino"},
    "tips2": {"tips", "dino"},
}
"""A recipe's method, the first word of its name -> the methods' plugins that it is composed of."""
STUDIES_OF = {
    "balance": {"flava", "clip"},
    "cosmos_table5": {"cosmos", "cosmos_variants", "clip"},
    "icons": {"cosmos", "clip"},
    "images": {"dino", "lejepa", "ijepa", "data2vec"},
    "methods": set().union(*METHODS.values()) - {"pretrained", "mobileclip", "clipself", "speech", "ijepa", "data2vec"},
}
"""A study -> the methods' plugins of what it compares."""
NOT_SHARED = set().union(*METHODS.values()) | {"cosmos_variants"}

Only = Callable[[Iterable[str]], Registry]


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> Only:
    """`only(methods)`: the components of what is shared and of these methods."""

    def discover(methods: Iterable[str]) -> Registry:
        monkeypatch.setenv(WITHOUT, ",".join(NOT_SHARED - set(methods)))
        return Registry.discover()

    return discover


def composed_of(recipe: Path) -> set[str]:
    return METHODS[recipe.stem.partition("_")[0]]


def test_the_table_names_plugins_and_methods_that_are_there() -> None:
    """Would catch a method without a recipe, and a plugin that was renamed."""
    assert NOT_SHARED < PLUGINS
    assert {recipe.stem.partition("_")[0] for recipe in RECIPES} == set(METHODS)
    assert {study.stem for study in STUDIES} == set(STUDIES_OF)
    assert [name for name, methods in METHODS.items() if "cosmos" in methods] == ["cosmos"]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda file: file.stem)
def test_a_recipe_needs_what_it_is_composed_of_alone(recipe: Path, only: Only) -> None:
    """Would catch clip_tiny with a text view that only COSMOS's package has."""
    load_recipe(recipe, registry=only(composed_of(recipe)), allow_unset=True)


@pytest.mark.parametrize(
    ("recipe", "method"),
    [(file, method) for file in RECIPES if file.parent.name != "published" for method in sorted(composed_of(file))],
    ids=lambda value: getattr(value, "stem", value),
)
def test_a_recipe_needs_all_that_it_is_composed_of(recipe: Path, method: str, only: Only) -> None:
    """Would catch a table above that allows more than a recipe uses."""
    with pytest.raises(RecipeErrors):
        load_recipe(recipe, registry=only(composed_of(recipe) - {method}), allow_unset=True)


@pytest.mark.slow
@pytest.mark.parametrize("file", STUDIES, ids=lambda file: file.stem)
def test_a_study_needs_the_methods_that_it_compares(file: Path, only: Only) -> None:
    def check(methods: set[str]) -> None:
        document = read_document(file.read_text(encoding="utf-8"), str(file))
        check_study(make_study(document, file.parent, file.stem), only(methods))

    check(STUDIES_OF[file.stem])
    for method in STUDIES_OF[file.stem]:
        with pytest.raises(RecipeErrors):
            check(STUDIES_OF[file.stem] - {method})


def test_the_command_validates_clip_without_cosmos(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(WITHOUT, "")  # the option is set in the process's environment: undone with the test
    main(["validate", str(ROOT / "recipes/clip_tiny.yaml"), "--without", "cosmos"])
    assert "clip_tiny.yaml: ok" in capsys.readouterr().out
