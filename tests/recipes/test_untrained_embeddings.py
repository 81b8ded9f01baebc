"""Which embeddings a recipe trains, as its losses say: what is scored, searched and exported by default follows."""

from pathlib import Path

import pytest
import torch

from distill_authoring.conformance.inputs import example_outputs, fits
from distill_authoring.conformance.loss import ids
from distill_authoring.conformance.suite import Case
from distill_core.interfaces import Loss
from distill_core.recipe.resolve import load_recipe
from distill_core.registry import Plugins, Registry

RECIPES = sorted(Path(__file__).parents[2].joinpath("recipes").glob("*_tiny.yaml"))
CASES = Plugins.discover().conformance_cases()
ENTRIES = [entry for (kind, _), entry in Registry.discover().entries.items() if kind == "loss"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipes(path: Path, registry: Registry) -> None:
    """Would catch a recipe of pictures alone whose projection, which nothing trains, is what is scored; and a locked
    tower whose own embedding is not."""
    images = ("data2vec_tiny", "dino_tiny", "gram_tiny", "ibot_tiny", "ijepa_tiny")
    untrained = {"image"} if path.stem in images else set()
    if path.stem == "clipself_tiny":  # its loss reads tokens; of its texts, which are frozen, the embedding was loaded
        untrained = {"image"}
    assert load_recipe(path, registry=registry, allow_unset=True).untrained_embeddings() == untrained


@pytest.mark.parametrize("cls", [entry.cls for entry in ENTRIES], ids=lambda cls: cls.name)
def test_a_gradient_reaches_the_embeddings_that_a_loss_says_it_trains(cls: type[Loss]) -> None:
    """Would catch a loss that reads class tokens or tokens alone and does not say so, or says so and reads more."""
    for options in cls.examples:
        config = cls.Config.model_validate(dict(options), strict=False)
        case = Case(cls, config, dict(options), CASES.of(cls))
        fit = fits(case)[0]
        loss = cls(config, fit.plan).train()
        given = example_outputs(fit, case.inputs, config, loss, ids=ids(case))
        torch.stack(list(loss(given)[0].values())).sum().backward()
        reached = {name for name, f in given.student.items() if f.pooled.grad is not None and f.pooled.grad.any()}
        if fit.needs.embeddings is not None:
            assert reached == set(fit.needs.embeddings)
        elif not fit.needs.fused:  # fused features are made of the embeddings
            assert reached <= fit.needs.named
            assert reached, "it trains no embedding: its `needs` should say embeddings=()"
