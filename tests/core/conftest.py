"""Recipes with overrides, and their errors."""

from collections.abc import Callable

import pytest
from base_recipe import BASE, Check

from distill_core.errors import RecipeErrors
from distill_core.recipe.resolve import parse_recipe
from distill_core.recipe.sections import Recipe
from distill_core.registry import Registry


@pytest.fixture
def check(registry: Registry) -> Check:
    """The base recipe (or `text`) with overrides."""

    def parse(*overrides: str, text: str = BASE, **options: bool) -> Recipe:
        return parse_recipe(text, "r.yaml", registry=registry, overrides=overrides, **options)

    return parse


@pytest.fixture
def errors(check: Check) -> Callable[..., list[str]]:
    def lines(*overrides: str, text: str = BASE, **options: bool) -> list[str]:
        with pytest.raises(RecipeErrors) as caught:
            check(*overrides, text=text, **options)
        assert str(caught.value).splitlines() == caught.value.lines, "each error is one line"
        return caught.value.lines

    return lines
