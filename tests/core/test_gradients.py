"""`train.clip_grad` by all gradients, by part and by parameter; `train.lr_decay`."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from distill_core.contracts.schedule import Ramp, Scheduled
from distill_core.errors import RecipeErrors
from distill_core.gradients import GradientLimit, limit_gradients
from distill_core.outputs import Progress
from distill_core.recipe.build import build_objective
from distill_core.recipe.resolve import parse_recipe
from distill_core.registry import Registry
from distill_core.step import TrainStep


def parameters() -> list[tuple[str, nn.Parameter]]:
    """Of three parts; one has no gradient, and one is small."""
    torch.manual_seed(0)
    names = ("backbone.a.x", "backbone.a.y", "backbone.b.x", "fusion.x.y", "fusion.z", "loss.d.scale")
    named = [(name, nn.Parameter(torch.zeros(5, 3))) for name in names]
    for i, (_, p) in enumerate(named):
        p.grad = torch.randn(5, 3) * (0.01 if i == 4 else 1 + i)
    named[5][1].grad = None
    return named


@pytest.mark.parametrize(
    ("by", "groups"),
    [
        ("global", [[0, 1, 2, 3, 4]]),
        ("part", [[0, 1], [2], [3, 4]]),
        ("parameter", [[0], [1], [2], [3], [4]]),
    ],
)
def test_by_which_norm(by: str, groups: list[list[int]]) -> None:
    """Against plain loops. Catches parts that are mixed, small gradients that grow, and a limit of another step."""
    named = parameters()
    before = [p.grad.clone() for _, p in named[:5] if p.grad is not None]
    norm = torch.stack([g.norm() for g in before]).norm()
    limit = GradientLimit(by=by, max=Scheduled.by(Ramp, start=4.0, end=0.0))  # type: ignore[arg-type]
    limit_gradients(named, norm, limit, Progress(5, 10))
    for group in groups:
        own = sum(float(before[i].square().sum()) for i in group) ** 0.5
        for i in group:
            torch.testing.assert_close(named[i][1].grad, before[i] * min(1.0, 2.0 / own), rtol=1e-5, atol=1e-7)
    assert named[5][1].grad is None


def test_in_a_recipe(recipe_text: str, registry: Registry) -> None:
    """Catches a limit that the step does not know, and factors of layers that are counted from the wrong end."""
    text = recipe_text.format(folder="x").replace("layers: 2", "layers: 3")
    overrides = ["train.clip_grad={by: parameter, max: 3}", "train.lr_decay={backbone.image: 0.5}"]
    overrides += ["train.lr_factors={backbone.image.conv1: 2, backbone.text: 0.1}", "train.optimizer.lr=1"]
    recipe = parse_recipe(text, "r.yaml", registry=registry, overrides=overrides)
    step = TrainStep(recipe, build_objective(recipe), torch.device("cpu"))
    assert step.limit == GradientLimit(by="parameter", max=Scheduled(3.0))
    rates = {id(p): group["lr"] for group in step.optimizer.param_groups for p in group["params"]}
    found = {name: rates[id(p)] for name, p, _ in step._named}
    for name, rate in found.items():
        block = re.match(r"backbone\.image\.transformer\.resblocks\.(\d)", name)
        expected = 0.5 ** (3 - int(block[1])) if block else 1.0
        if re.match(r"backbone\.image\.(class_embedding|positional_embedding|ln_pre)", name):
            expected = 0.5**4
        if name == "backbone.image.conv1.weight":
            expected = 2 * 0.5**4
        if name.startswith("backbone.text"):
            expected = 0.1
        assert rate == pytest.approx(expected), name
    with pytest.raises(RecipeErrors) as caught:
        parse_recipe(text, "r.yaml", registry=registry, overrides=["train.lr_decay={backbone.imag: 0.5, fusion: 0.5}"])
    first, second = (line.removeprefix("--set train.lr_decay: train.lr_decay.") for line in caught.value.lines)
    assert first == "backbone.imag: 'backbone.imag' is no backbone, did you mean 'backbone.image'?"
    assert second == "fusion: 'fusion' is no backbone (there are: backbone.image, backbone.text)"
    with pytest.raises(RecipeErrors, match=r"train\.clip_grad\.max: is required"):
        parse_recipe(text, "r.yaml", registry=registry, overrides=["train.clip_grad={by: part}"])


@pytest.mark.slow
def test_a_step_by_parameter(
    tmp_path: Path, recipe_text: str, registry: Registry, write_shards: Callable[..., list[Path]]
) -> None:
    """Catches a limit that comes after the optimiser's step: with a tiny one, plain descent moves each weight by it."""
    from distill_core.run.folder import RunFolder
    from distill_core.train import Trainer

    for prefix in ("train", "validation", "test"):
        write_shards(tmp_path / "shards", 1, 8, prefix=prefix)
    overrides = ["train.clip_grad={by: parameter, max: 1e-3}", "train.steps=1", "evaluate=null"]
    recipe = parse_recipe(
        recipe_text.format(folder=tmp_path / "shards"), "r.yaml", registry=registry, overrides=overrides
    )
    trainer = Trainer(recipe, RunFolder.create(tmp_path / "run", recipe), quiet=True)
    step = trainer.train_step
    step.optimizer = torch.optim.SGD(step.parameters, lr=1.0)
    step.built = [{"lr": 1.0}]
    step.maker = type("Plain", (), {"before_step": lambda *_: None})()  # type: ignore[assignment]
    before = [p.detach().clone() for p in step.parameters]
    trainer.run()
    moved = torch.stack([(p.detach() - old).norm() for p, old in zip(step.parameters, before, strict=True)])
    assert moved.max() <= 1e-3 * (1 + 1e-4)
    assert (moved > 0.9e-3).float().mean() > 0.3
