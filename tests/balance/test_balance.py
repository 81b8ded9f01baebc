"""Weights of losses that are learned or follow a rule: against their formulas, and in runs that are stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from small_runs import parse
from torch import Tensor

from distill_balance.components import EqualMagnitude, EqualMagnitudeConfig, Uncertainty, UncertaintyConfig
from distill_core import Outputs, Progress
from distill_core.errors import RecipeErrors
from distill_core.gradient_cache import GradientCache
from distill_core.recipe.build import build_objective
from distill_core.recipe.resolve import parse_recipe
from distill_core.recipe.sections import Recipe
from distill_core.registry import Registry
from distill_core.run.checkpoint import Checkpoints
from distill_core.run.folder import RunFolder
from distill_core.step import TrainStep
from distill_core.tools import example_batch
from distill_core.train import Trainer

NOW = Progress(0, 9)


def test_uncertainty_against_the_paper() -> None:
    """sum of L / sigma^2 + log sigma over cross-entropies, of sigmas that plain descent moves. Catches a penalty of
    another size, and a factor that is not exp(-s)."""
    balance = Uncertainty(UncertaintyConfig(limit=1.0), ("a", "b"))
    values = {"a": 4.0, "b": 0.1}
    sigma = dict.fromkeys(values, 1.0)
    for step in range(200):
        losses = {name: torch.tensor(value * (1 + 0.5 * (step % 2))) for name, value in values.items()}
        factors, penalties = balance(losses, Outputs())
        total = sum(factors[name] * losses[name] + penalties[name] for name in values)
        expected = sum(float(losses[n]) / sigma[n] ** 2 + torch.tensor(sigma[n]).log() for n in values)
        assert float(total.detach()) == pytest.approx(float(expected), rel=1e-4)
        balance.zero_grad()
        total.backward()
        for name, s in balance.log_variance.items():
            # d/ds of L exp(-s) + s / 2
            assert s.grad is not None
            assert float(s.grad) == pytest.approx(0.5 - float(losses[name]) / sigma[name] ** 2, rel=1e-4, abs=1e-5)
            with torch.no_grad():
                s.sub_(0.05 * s.grad)
        balance.after_step(losses, NOW)
        sigma = {name: float((s.detach() / 2).exp()) for name, s in balance.log_variance.items()}
    assert max(abs(float(s.detach())) for s in balance.log_variance.values()) <= 1.0
    assert sigma["a"] > 1 > sigma["b"]


def test_equal_magnitude_against_its_rule() -> None:
    """Catches a factor of this step's own value, a mean that begins at zero, and a loss that is absent for a step."""
    balance = EqualMagnitude(EqualMagnitudeConfig(momentum=0.5, limit=50.0), ("a", "b", "c"))
    steps = [(4.0, 0.5, -1.0), (2.0, 0.7, 0.0), (6.0, 0.1, -3.0), (1.0, 1e-6, -2.0)]
    sizes: dict[str, float] = {}
    for row in steps:
        losses = {name: torch.tensor(value, requires_grad=True) for name, value in zip("abc", row, strict=True)}
        factors, penalties = balance(losses, Outputs())
        mean = sum(sizes.values()) / max(len(sizes), 1)
        for name in "abc":
            expected = min(mean / sizes[name], 50.0) if name in sizes else 1.0
            assert float(factors[name]) == pytest.approx(expected, rel=1e-5)
        assert penalties == {}
        if sizes:
            sum_of = sum(factors[name] * sizes[name] for name in "abc")
            assert float(sum_of) == pytest.approx(sum(sizes.values()), rel=1e-5)
        balance.after_step({name: value.detach() for name, value in losses.items()}, NOW)
        for name, value in zip("abc", row, strict=True):
            if value:
                sizes[name] = 0.5 * sizes[name] + 0.5 * abs(value) if name in sizes else abs(value)


def gradients(recipe: Recipe, size: int | None) -> tuple[float, dict[str, Tensor]]:
    torch.manual_seed(0)
    objective, batch = build_objective(recipe), example_batch(recipe, 6)
    assert objective.balance is not None
    with torch.no_grad():
        for number, value in enumerate(objective.balance.parameters()):
            value.fill_(0.5 - number)
        for number, value in enumerate(objective.balance.buffers()):
            value.fill_(0.5 + number)
    cache = GradientCache(objective, batch, NOW, size) if size is not None else None
    losses = objective.losses(cache.outputs if cache else objective.represent(batch, NOW))
    losses.total.backward()
    if cache:
        cache.backward()
    return losses.total.item(), {n: p.grad.clone() for n, p in objective.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["uncertainty", "equal_magnitude"])
def test_gradients_are_the_weighted_sums_also_by_micro_batches(small_text: str, registry: Registry, name: str) -> None:
    """Catches a factor that is applied twice or to the metrics' terms, and one that a micro-batch leaves out."""
    recipe = parse(small_text, registry, f"balance={name}", "loss.1.weight=0.5")
    total, whole = gradients(recipe, None)
    assert {n for n in whole if n.startswith("balance.")} == (
        {f"balance.log_variance.{loss.id}" for loss in recipe.loss} if name == "uncertainty" else set()
    )
    own_total, own = gradients(recipe, 2)
    assert own_total == pytest.approx(total, rel=1e-6)
    for parameter, gradient in whole.items():
        torch.testing.assert_close(own[parameter], gradient, rtol=1e-4, atol=1e-5, msg=parameter)
    factors = [torch.tensor(-0.5).exp(), torch.tensor(0.5).exp()] if name == "uncertainty" else [2.0, 1.0 / 1.5]
    plain = parse(
        small_text, registry, f"loss.0.weight={float(factors[0])}", f"loss.1.weight={0.5 * float(factors[1])}"
    )
    torch.manual_seed(0)
    objective = build_objective(plain)
    objective.losses(objective.represent(example_batch(plain, 6), NOW)).total.backward()
    for parameter, p in objective.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(whole[parameter], p.grad, rtol=1e-4, atol=1e-5, msg=parameter)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["uncertainty", "equal_magnitude"])
def test_a_run_is_resumed_exactly_and_logs_the_factors(
    small_text: str, registry: Registry, tmp_path: Path, name: str
) -> None:
    """Through a stage that adds a loss. Catches state that a checkpoint or a stage loses, a loss that has no factor,
    and a factor that nobody sees."""
    recipe = parse(
        small_text,
        registry,
        f"balance={name}",
        "train.lr_factors={balance: 10}" if name == "uncertainty" else "train.lr_factors={}",
        "stages=[{at: 3, set: {loss.2: {name: clip, id: late}}}]",
    )
    folder = RunFolder.create(tmp_path, recipe)
    Trainer(recipe, folder, quiet=True).run()
    end = Checkpoints(folder.path).read()
    rows = [json.loads(line) for line in (folder.path / "metrics.jsonl").read_text().splitlines()]
    logged = [{k: v for k, v in row["metrics"].items() if k.startswith("balance/")} for row in rows if "metrics" in row]
    assert [len(row) for row in logged] == [2, 2, 2, 3, 3, 3]
    assert logged[0] == pytest.approx({"balance/contrastive": 1.0, "balance/cross_modal_distillation": 1.0})
    assert logged[2]["balance/contrastive"] != pytest.approx(1.0, abs=1e-4)
    assert logged[3]["balance/late"] == pytest.approx(1.0)
    for at in ("2", "4"):
        again = parse_recipe((folder.path / "recipe.yaml").read_text(), "recipe.yaml", registry=registry)
        Trainer(again, RunFolder(folder.path), resume=at, quiet=True).run()
        finished = Checkpoints(folder.path).read()
        assert any(key.startswith("balance.") for key in end["objective"])
        for key, tensor in end["objective"].items():
            assert torch.equal(tensor, finished["objective"][key]), key


@pytest.mark.parametrize("name", ["uncertainty", "equal_magnitude"])
def test_a_step_that_is_not_finite_moves_nothing(small_text: str, registry: Registry, name: str) -> None:
    """Catches a NaN that stays in a running mean for the rest of a run."""
    recipe = parse(small_text, registry, f"balance={name}", "train.nonfinite=skip")
    torch.manual_seed(0)
    step = TrainStep(recipe, build_objective(recipe), torch.device("cpu"))
    batch = example_batch(recipe, 4)
    step(batch, Progress(0, 9))
    before = {key: value.clone() for key, value in step.objective.state_dict().items() if key.startswith("balance.")}
    for group in batch.views["image"].groups:
        group.x = group.x * torch.nan
    assert not step(batch, Progress(1, 9)).finite
    for key, value in before.items():
        assert torch.equal(step.objective.state_dict()[key], value), key


def test_it_is_off_by_default_and_its_parts_have_names(small_text: str, registry: Registry) -> None:
    """Catches a balance that costs something where there is none, and paths that a recipe cannot name."""
    recipe = parse(small_text, registry)
    assert recipe.balance is None
    assert not any(key.startswith("balance") for key in build_objective(recipe).state_dict())
    frozen = parse(small_text, registry, "balance=uncertainty", "freeze=[balance.log_variance.contrastive]")
    assert frozen.freeze == ["balance.log_variance.contrastive"]
    with pytest.raises(RecipeErrors, match=r"'balance\.log_variances' names no part of the model, did you mean"):
        parse(small_text, registry, "balance=uncertainty", "freeze=[balance.log_variances]")
    with pytest.raises(RecipeErrors, match="'balance' names no part of the model"):
        parse(small_text, registry, "freeze=[balance]")
