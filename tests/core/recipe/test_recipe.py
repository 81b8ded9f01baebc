"""Resolved recipes: what a run folder keeps is the recipe that ran, to the last digit."""

from pathlib import Path

import pytest
import yaml

from distill_core.recipe.resolve import load_recipe, parse_recipe
from distill_core.registry import Registry

ROOT = Path(__file__).parents[3]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))

OVERRIDES = [
    [],
    ["train.steps=3", "data.batch_size=4", "data.source={name: emoji}"],
    ["train.optimizer.lr=1e-5", "train.optimizer.eps=1e-12", "train.lr_factors={backbone.text: 0.1}"],
    ["loss.0.id=first", "loss.0.max_scale=.inf", "tracking=null", "freeze=[backbone.text]"],
    ["loss.0.weight=1e-7", "train.checkpoint={every: null, keep: 7}", "evaluate=null", "name=other", "seed=7"],
    ["loss.1={name: clip, id: first}", "loss.0=null", "weights.0={name: state_dict, source: 'off'}"],
]


NO_SCALE = ("clipself_tiny", "lejepa_pairs_tiny")
"""Recipes whose first loss has no `max_scale`."""
ONE_MODALITY = [[], OVERRIDES[1], ["loss.0.id=first", "loss.0.weight=1e-7", "evaluate=null", "seed=7"]]
FAST = ("cosmos_tiny", "dino_tiny")
"""With overrides; the other recipes are fast as they are."""
CASES = [
    pytest.param(file, overrides, id=f"{file.stem}-{i}", marks=pytest.mark.slow if i and file.stem not in FAST else ())
    for file in RECIPES
    for i, overrides in enumerate(OVERRIDES if "text:" in file.read_text(encoding="utf-8") else ONE_MODALITY)
    if not (file.stem in NO_SCALE and "loss.0.max_scale=.inf" in overrides)
    if not (file.stem == "tips2_tiny" and "loss.0=null" in overrides)  # its teacher copies a head of loss.1
]


@pytest.mark.parametrize(("file", "overrides"), CASES)
def test_a_resolved_recipe_loads_to_an_equal_recipe(registry: Registry, file: Path, overrides: list[str]) -> None:
    """A run folder keeps to_yaml(): would catch a default that is not written, a number that changes its value, and an
    override that is lost. Plain PyYAML must read the same numbers."""
    recipe = load_recipe(file, registry=registry, overrides=overrides, allow_unset=True)
    text = recipe.to_yaml()
    again = parse_recipe(text, "again.yaml", registry=registry, allow_unset=True)
    assert again == recipe
    assert again.to_yaml() == text
    assert yaml.safe_load(text) == recipe.to_dict()


def test_equality_of_recipes_is_not_empty(registry: Registry) -> None:
    """Guards the test above: two recipes that differ anywhere are not equal."""
    file = ROOT / "recipes" / "cosmos_tiny.yaml"
    base = load_recipe(file, registry=registry)
    changes = ["seed=1", "loss.0.weight=2", "train.optimizer.lr=1", "teacher.momentum=0.8", "evaluate.tasks=null"]
    changes += ["data.source.size=64", "tracking=null", "fusion.heads=8", "augment.image.flip=0", "freeze=[fusion]"]
    for change in changes:
        assert load_recipe(file, registry=registry, overrides=[change]) != base, change


def test_shipped_recipes_are_valid_without_a_users_machine(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {file.stem for file in RECIPES} >= {"cosmos_vitb16", "cosmos_tiny", "clip_tiny"}
    monkeypatch.delenv("CC3M", raising=False)
    for file in RECIPES:
        load_recipe(file, registry=registry, allow_unset=True)
