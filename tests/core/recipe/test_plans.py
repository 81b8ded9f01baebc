"""The plan of a recipe's parts, and of the rest of them where some are wrong."""

from __future__ import annotations

from typing import Any

import pytest
from base_recipe import BASE

from distill_core import Backbone, BackboneSpec, UserError, hookimpl
from distill_core.errors import RecipeErrors
from distill_core.recipe.resolve import parse_recipe
from distill_core.registry import Registry


class Elsewhere(Backbone):
    """Its widths stand in a file that may be missing."""

    name = "elsewhere"
    there = True

    @classmethod
    def spec(cls, config: Any) -> BackboneSpec:
        if not cls.there:
            raise UserError("widths.json: no such file; fetch it")
        return BackboneSpec(16, 16)

    @classmethod
    def collator(cls, config: Any) -> Any:
        raise AssertionError("not for checking")

    def encode(self, x: Any, *, tokens: bool, token_mask: Any) -> Any:
        raise AssertionError("not for checking")


class Plugin:
    """A stranger's."""

    @staticmethod
    @hookimpl
    def distill_components() -> list[type]:
        return [Elsewhere]


@pytest.fixture
def more(registry: Registry) -> Registry:
    return Registry([*registry.entries.values(), *Registry.of(Plugin).entries.values()])


@pytest.mark.parametrize(
    ("place", "overrides"),
    [
        ("backbone.image", ["backbone.image={name: elsewhere}"]),
        (
            "teacher",
            [
                "teacher={name: frozen, modalities: [image, text], backbone: {image: {name: elsewhere}, text: "
                "{name: clip_text, width: 16, layers: 1, heads: 2, dim: 16}}, "
                "weights: [{name: state_dict, source: x.pt, to: backbone}]}"
            ],
        ),
    ],
)
def test_a_backbone_that_cannot_tell_its_widths(
    place: str, overrides: list[str], more: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its reason is the only line: would catch lines of the losses and the teacher that only follow from it, and a
    traceback out of a component that asks the plan for what it lacks."""
    monkeypatch.setattr(Elsewhere, "there", False)
    with pytest.raises(RecipeErrors) as caught:
        parse_recipe(BASE, "r.yaml", registry=more, overrides=overrides)
    assert caught.value.lines == [f"--set {place}: widths.json: no such file; fetch it"]


def test_the_plan_of_a_checked_recipe_that_no_longer_holds(more: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """What can no longer be told names its place: would catch a plan without the modality."""
    recipe = parse_recipe(BASE, "r.yaml", registry=more, overrides=["backbone.image={name: elsewhere}"])
    monkeypatch.setattr(Elsewhere, "there", False)
    del recipe.__dict__["plan"]
    with pytest.raises(UserError, match=r"^backbone\.image: widths\.json: no such file; fetch it$"):
        _ = recipe.plan
