"""Components inside components: a `Slot` in any component's options is read, checked and written as a recipe's."""

from typing import Any

import pytest
from base_recipe import BASE

from distill_core import Loss, LossConfig, Plan, Slot, hookimpl
from distill_core.contracts.slot import Context
from distill_core.errors import RecipeErrors
from distill_core.plan import Needs
from distill_core.recipe.resolve import parse_recipe
from distill_core.recipe.sections import Recipe, TrainConfig
from distill_core.registry import Registry


class SumConfig(LossConfig):
    """Losses that are added up."""

    parts: list[Slot[Loss]]
    """What is added up."""
    last: Slot[Loss] | None = None
    """One more."""


class Sum(Loss):
    """The sum of other losses."""

    name = "sum"
    Config = SumConfig

    def __init__(self, config: SumConfig, plan: Plan) -> None:
        super().__init__(config, plan)
        self.parts = [part.build(plan) for part in config.parts]

    @classmethod
    def needs(cls, config: SumConfig, plan: Plan) -> Needs:
        return Needs()

    def forward(self, outputs: Any) -> Any:
        raise NotImplementedError


class Plugin:
    """The sum alone."""

    @staticmethod
    @hookimpl
    def distill_components() -> list[type]:
        return [Sum]


@pytest.fixture(scope="module")
def more(registry: Registry) -> Registry:
    return Registry([*registry.entries.values(), *Registry.of(Plugin).entries.values()])


def parse(more: Registry, *overrides: str) -> Recipe:
    return parse_recipe(BASE, "r.yaml", registry=more, overrides=overrides)


def test_nested_components_are_read_in_the_short_forms(more: Registry) -> None:
    """Would catch a nested place that takes no bare name, no null, no `none`, and no option of an override."""
    recipe = parse(
        more,
        "loss.0={name: sum, parts: [clip, null, {name: contrastive, id: mine}], last: none}",
        "loss.0.parts.0.weight=2",
    )
    (first, second), last = recipe.loss[0].config.parts, recipe.loss[0].config.last
    assert (first.cls.name, first.config.weight, first.path) == ("clip", 2.0, "loss.0.parts.0")
    assert (second.id, second.path, last) == ("mine", "loss.0.parts.2", None)
    assert [slot.path for slot in recipe.slots() if slot.path.startswith("loss.0")] == [
        "loss.0",
        "loss.0.parts.0",
        "loss.0.parts.2",
    ]
    assert [type(part).name for part in recipe.loss[0].build(recipe.plan).parts] == ["clip", "contrastive"]
    assert parse_recipe(recipe.to_yaml(), "again.yaml", registry=more) == recipe


def test_errors_inside_nested_components_come_with_the_others(more: Registry) -> None:
    """Would catch a nested error without its whole path, one that hides others, and needs that nobody checks."""
    wrong = "{name: clip, wieght: 1, weight: x}, nope, {name: contrastive, modalities: [image, sound]}"
    with pytest.raises(RecipeErrors) as caught:
        parse(more, f"loss.0={{name: sum, parts: [{wrong}]}}", "fusion.heads=x")
    unknown = [line for line in caught.value.lines if "'nope'" in line]
    assert caught.value.lines == [
        "--set loss.0: loss.0.parts.0.weight: must be a number or a schedule; there is no schedule named 'x' "
        "(there are: constant, cosine, ramp, steps, warmup_cosine)",
        "--set loss.0: loss.0.parts.0.wieght: unknown option 'wieght', did you mean 'weight'?",
        *unknown,
        "--set loss.0: loss.0.parts.2: 'contrastive' needs a modality 'sound' (there are: image, text)",
        "--set fusion.heads: must be an integer, got 'x'",
    ]
    assert len(unknown) == 1
    assert unknown[0].startswith("--set loss.0: loss.0.parts.1: no loss named 'nope'")


def test_a_section_is_validated_by_itself_with_a_registry_and_only_with_one(registry: Registry) -> None:
    """Would catch defaults that stay names, and a slot that is left as plain data where no registry is given."""
    train = TrainConfig.model_validate_json('{"optimizer": {"name": "adamw", "lr": 1}}', context=Context(registry))
    assert (train.optimizer.config.lr, train.schedule.source.cls.name) == (1.0, "warmup_cosine")
    with pytest.raises(TypeError, match="a component is looked up in a registry"):
        TrainConfig.model_validate_json("{}")
