"""Several fusions in a recipe: each loss reads the one that it names, and none other is trained by it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from trainers import trainers

import distill_core
from distill_core.outputs import Progress
from distill_core.recipe.build import build_objective
from distill_core.recipe.resolve import load_recipe, parse_recipe
from distill_core.recipe.sections import Recipe
from distill_core.registry import Registry
from distill_core.train import Trainer

TWO = (
    "fusions={wide: {name: cross_attention, heads: 4}}",
    "loss.2={name: cross_modal_distillation, id: second, fusion: wide, weight: 0.5}",
)


@pytest.fixture
def recipe(tiny_recipe: Path, registry: Registry) -> Callable[..., Recipe]:
    return lambda *overrides: load_recipe(tiny_recipe, registry=registry, overrides=[*TWO, *overrides])


@pytest.fixture
def trainer(recipe: Callable[..., Recipe], tmp_path: Path) -> Iterator[Callable[..., Trainer]]:
    with trainers(tmp_path / "runs") as make:
        yield lambda *overrides, resume=None: make(recipe(*overrides), resume)


def test_each_loss_reads_and_trains_its_own(trainer: Callable[..., Trainer]) -> None:
    """Catches a loss that is given the default in the other's place, features that are fused once for both, and rows
    of the one that are compared in the other's loss."""
    made = trainer()
    objective = made.objective
    outputs = objective.represent(next(iter(made.loader)), Progress(1, 4))
    default, wide = outputs.fused, outputs.fusions["wide"].fused
    assert not torch.allclose(default["image"].pooled, wide["image"].pooled, atol=1e-3)
    losses = objective.losses(outputs)
    first, second = losses.terms["cross_modal_distillation"], losses.terms["second"]
    assert losses.weights["second"] == 0.5
    loss: Any = objective.loss["second"]
    again, _ = loss(outputs.reading("wide"))
    torch.testing.assert_close(sum(again.values()), second)
    for term, own, other in ((first, "fusion", "fusions.wide"), (second, "fusions.wide", "fusion")):
        parameters = list(objective.get_submodule(other).parameters())
        assert all(g is None for g in torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True))
        parameters = list(objective.get_submodule(own).parameters())
        gradients = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
        assert any(g is not None and g.abs().max() > 0 for g in gradients)


@pytest.mark.parametrize(
    "overrides",
    [(), ("teacher.of=[backbone.image, backbone.text, fusions.wide]",), ("train.parallel.micro_batch=2",)],
)
def test_it_trains_and_resumes(overrides: tuple[str, ...], trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    """The resumed run is the one that was not stopped, bit for bit, with a teacher's copy of a named fusion too; a
    loaded model has the fusions. In parts of a batch the losses are those of the whole."""
    whole = trainer("train.checkpoint.every=2", *overrides)
    whole.run()
    expected = {name: x.clone() for name, x in whole.objective.state_dict().items()}
    assert any(name.startswith("fusions.wide.") for name in expected)
    assert any(name.startswith("teacher.default.fusions.wide.") for name in expected) is any(
        "of=" in o for o in overrides
    )
    stopped = tmp_path / "stopped"
    shutil.copytree(whole.folder.path, stopped)
    (stopped / "checkpoints" / "step-00000004.pt").unlink()
    resumed = trainer("train.checkpoint.every=2", *overrides, resume=stopped)
    resumed.run()
    for name, x in resumed.objective.state_dict().items():
        assert torch.equal(x, expected[name]), name
    model = distill_core.load(whole.folder.path)
    assert model.fusion is not None
    for name, x in model.fusions["wide"].state_dict().items():
        assert torch.equal(x, expected[f"fusions.wide.{name}"])


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("loss.2.fusion=wode", "'second': no fusion 'wode', did you mean 'wide'?"),
        ("loss.0={name: contrastive, fusion: wide}", "'contrastive' reads no fused views: leave its `fusion` out"),
        ("fusions={default: {name: cross_attention}}", "'default' is the name of the section `fusion`"),
        ("freeze=[fusions.wode]", "'fusions.wode' names no part of the model"),
        ("teacher.of=[fusions.wode]", "names no fusion of this recipe"),
    ],
)
def test_what_makes_no_sense_is_refused(
    override: str, line: str, recipe: Callable[..., Recipe], tiny_recipe: Path
) -> None:
    with pytest.raises(distill_core.UserError) as caught:
        recipe(override)
    assert line in str(caught.value)


def test_all_of_them_are_frozen_together(recipe: Callable[..., Recipe]) -> None:
    """Catches a refusal of the section's name, which those of `heads` and `backbone` are not."""
    frozen = recipe("freeze=[fusions]")
    trained = [name for name, _, _ in build_objective(frozen).trainable(frozen.freeze, {})]
    assert any(name.startswith("fusion.") for name in trained)
    assert not any(name.startswith("fusions.") for name in trained)


def test_a_recipe_with_named_fusions_reads_itself(recipe: Callable[..., Recipe], registry: Registry) -> None:
    resolved = recipe("fusion=null", "loss.1=null")
    assert parse_recipe(resolved.to_yaml(), "again.yaml", registry=registry) == resolved
    (warning,) = [line for line in recipe("loss.2=null").warnings if "fusions.wide" in line]
    assert "no loss of this recipe reads 'cross_attention'" in warning
