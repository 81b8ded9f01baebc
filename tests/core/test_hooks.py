"""Hooks around a step, as a stranger's package would write them: SAM, PCGrad, and weights of terms with a state."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
from pydantic import Field
from small_runs import parse
from torch import Tensor, nn

from distill_authoring.conformance import assert_conforms
from distill_core import Batch, ComponentConfig, Computation, Hook, Losses, Outputs, Progress, hookimpl
from distill_core.errors import RecipeErrors
from distill_core.recipe.build import build_objective
from distill_core.recipe.resolve import parse_recipe
from distill_core.recipe.sections import Recipe
from distill_core.registry import Registry
from distill_core.run.checkpoint import Checkpoints
from distill_core.run.folder import RunFolder
from distill_core.step import TrainStep
from distill_core.train import Trainer


class SamConfig(ComponentConfig):
    """Options of SAM."""

    rho: Annotated[float, Field(gt=0)] = 0.05
    """How far up the weights are moved."""


class Sam(Hook):
    """Sharpness-aware minimisation (Foret et al. 2021): the gradients at the top of the slope."""

    name = "sam"
    Config = SamConfig

    def gradients(self, computation: Computation, compute: Callable[[], Losses]) -> Losses:
        """Those of the weights that are moved along the first gradients."""
        losses = compute()
        weights = [p for _, p in computation.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in weights if p.grad is not None])
        kept = [p.detach().clone() for p in weights]
        with torch.no_grad():
            for p in weights:
                assert p.grad is not None
                p.add_(p.grad * (self.config.rho / (norm + 1e-12)))
                p.grad = None
        compute()
        with torch.no_grad():
            for p, old in zip(weights, kept, strict=True):
                p.copy_(old)
        return losses


class PcGrad(Hook):
    """PCGrad (Yu et al. 2020): of two terms that pull apart, each gives way."""

    name = "pcgrad"

    def gradients(self, computation: Computation, compute: Callable[[], Losses]) -> Losses:
        """The sum of the terms' gradients, each without what runs against another's."""
        losses = computation.forward()
        weights = [p for _, p in computation.parameters]
        of_terms = []
        for name, term in losses.terms.items():
            found = torch.autograd.grad(losses.weights[name] * term, weights, retain_graph=True, allow_unused=True)
            filled = [torch.zeros_like(p) if g is None else g for p, g in zip(weights, found, strict=True)]
            of_terms.append(torch.cat([g.flatten() for g in filled]))
        projected = []
        for i, own in enumerate(of_terms):
            for j, other in enumerate(of_terms):
                if i != j and (product := own @ other) < 0:
                    own = own - product / (other @ other) * other
            projected.append(own)
        joint = torch.stack(projected).sum(0).split([p.numel() for p in weights])
        for p, g in zip(weights, joint, strict=True):
            p.grad = g.view_as(p).clone()
        computation.average()
        return losses


class Steady(Hook):
    """Terms are divided by a running mean of their size; counts samples, and steps that were finite."""

    name = "steady"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.sizes: dict[str, Tensor] = {}
        self.samples = 0
        self.finite = torch.zeros(())

    def before_forward(self, batch: Batch, progress: Progress) -> Batch:
        """Counts."""
        self.samples += len(batch.keys)
        return batch

    def gradients(self, computation: Computation, compute: Callable[[], Losses]) -> Losses:
        """Of the sum of the terms so scaled."""
        losses = computation.forward()
        for name, term in losses.terms.items():
            old = self.sizes.get(name, term.detach())
            self.sizes[name] = 0.5 * old + 0.5 * term.detach()
        scaled = [losses.weights[name] * term / self.sizes[name] for name, term in losses.terms.items()]
        computation.backward(torch.stack(scaled).sum())
        return losses

    def after_step(self, computation: Computation, finite: Tensor) -> None:
        """Counts."""
        self.finite = self.finite + finite

    def state_dict(self) -> dict[str, Any]:
        """The means and the counts."""
        return {"sizes": dict(self.sizes), "samples": self.samples, "finite": self.finite}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The same."""
        self.sizes, self.samples, self.finite = dict(state["sizes"]), state["samples"], state["finite"]


class Plugin:
    """A stranger's."""

    @staticmethod
    @hookimpl
    def distill_components() -> list[type]:
        return [Sam, PcGrad, Steady]


@pytest.fixture(scope="module")
def more(registry: Registry) -> Registry:
    return Registry([*registry.entries.values(), *Registry.of(Plugin).entries.values()])


@pytest.mark.slow
@pytest.mark.parametrize("component", [Sam, PcGrad, Steady], ids=lambda component: component.name)
def test_conforms(component: type[Hook]) -> None:
    assert_conforms(component)


def computation(module: nn.Linear, x: Tensor, targets: dict[str, Tensor]) -> Computation:
    def forward() -> tuple[Outputs, Losses]:
        terms = {name: (module(x) * target).sum() for name, target in targets.items()}
        outputs = Outputs()
        return outputs, Losses(torch.stack([*terms.values()]).sum(), terms, {}, dict.fromkeys(terms, 1.0))

    return Computation([*module.named_parameters()], Progress(0, 1), forward, Tensor.backward, lambda: None)


def test_pcgrad_against_its_algorithm() -> None:
    """Two terms whose gradients are known: they pull apart, or do not."""
    module, x = nn.Linear(2, 1, bias=False), torch.eye(2)
    for a, b, expected in (
        ([1.0, 0.0], [-1.0, 1.0], [0.5, 1.5]),
        ([1.0, 0.0], [1.0, 1.0], [2.0, 1.0]),
    ):
        module.zero_grad()
        made = computation(module, x, {"a": torch.tensor(a)[:, None], "b": torch.tensor(b)[:, None]})
        PcGrad(ComponentConfig()).gradients(made, made.plain)
        torch.testing.assert_close(module.weight.grad, torch.tensor([expected]))


def first_gradients(recipe: Recipe) -> tuple[TrainStep, dict[str, Tensor]]:
    """Those of a step whose optimiser does nothing."""
    from distill_core.tools import example_batch

    torch.manual_seed(0)
    step = TrainStep(recipe, build_objective(recipe), torch.device("cpu"))
    step.optimizer = torch.optim.SGD(step.parameters, lr=0.0)
    step.built = [{"lr": 0.0}]
    step.maker.before_step = lambda *_: None  # type: ignore[method-assign]
    step(example_batch(recipe, 4), Progress(0, 10))
    return step, {name: p.grad.clone() for name, p, _ in step._named if p.grad is not None}


@pytest.mark.slow
def test_sam_in_a_step(small_text: str, more: Registry) -> None:
    """Against the gradients of an objective that is moved by hand. Catches weights that stay moved, gradients of both
    passes that are added up, and a step that does not come by its hooks."""
    rho = 0.5
    plain, before = first_gradients(parse(small_text, more))
    weights = {name: p.detach().clone() for name, p, _ in plain._named}
    norm = torch.stack([g.norm() for g in before.values()]).norm()
    recipe = parse(small_text, more, f"hooks=[{{name: sam, rho: {rho}}}]")
    step, found = first_gradients(recipe)
    for name, p, _ in step._named:
        assert torch.equal(p.detach(), weights[name]), name
    moved, _ = first_gradients(parse(small_text, more))
    with torch.no_grad():
        for name, p, _ in moved._named:
            if name in before:
                p.add_(before[name] * (rho / norm))
    from distill_core.tools import example_batch

    moved(example_batch(recipe, 4), Progress(0, 10))
    for name, p, _ in moved._named:
        if name in found:
            torch.testing.assert_close(found[name], p.grad, rtol=1e-3, atol=1e-5)
    assert any((found[name] - before[name]).abs().max() > 1e-3 for name in found)


@pytest.mark.slow
def test_their_state_is_in_checkpoints_and_over_stages(small_text: str, more: Registry, tmp_path: Path) -> None:
    """Catches a hook that a resumed run, or a stage, begins anew; and two of one name without an id."""
    options = ("hooks=[steady, {name: sam, rho: 0.01}]", "stages=[{at: 3, set: {hooks.sam.rho: 0.02}}]")
    recipe = parse(small_text, more, *options)
    folder = RunFolder.create(tmp_path, recipe)
    Trainer(recipe, folder, quiet=True).run()
    end = Checkpoints(folder.path).read()
    state = end["hooks"]["steady"]
    assert (state["samples"], float(state["finite"]), sorted(state["sizes"])) == (
        24, 6.0, ["contrastive", "cross_modal_distillation"],
    )  # fmt: skip
    for step in ("2", "4"):
        again = parse_recipe((folder.path / "recipe.yaml").read_text(), "recipe.yaml", registry=more)
        Trainer(again, RunFolder(folder.path), resume=step, quiet=True).run()
        finished = Checkpoints(folder.path).read()
        for name, tensor in end["objective"].items():
            assert torch.equal(tensor, finished["objective"][name]), name
        for name, size in state["sizes"].items():
            assert torch.equal(size, finished["hooks"]["steady"]["sizes"][name])
        assert finished["hooks"]["steady"]["samples"] == 24
    with pytest.raises(RecipeErrors, match="a second 'sam': give it an `id:` of its own"):
        parse(small_text, more, "hooks=[sam, sam]")
