"""Losses over a whole batch, gradients through a few samples at a time: the gradients of the step at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from distill_core import Loss, Needs, Outputs, Plan
from distill_core.batch import Batch
from distill_core.data.example import example_batch
from distill_core.errors import RecipeErrors, UserError
from distill_core.gradient_cache import GradientCache
from distill_core.objective import Objective
from distill_core.outputs import Progress
from distill_core.parallel import lay_out
from distill_core.recipe.build import build_objective
from distill_core.recipe.resolve import load_recipe
from distill_core.recipe.sections import ParallelConfig
from distill_core.registry import Entry, Registry

NOW = Progress(0, 9)


class Held:
    """The most bytes that the graphs of its contexts hold for their backward passes at a time."""

    def __init__(self, objective: Objective) -> None:
        self.weights = {p.untyped_storage().data_ptr() for p in objective.parameters()}
        self.live: dict[int, int] = {}
        self.most = 0

    def _pack(self, tensor: torch.Tensor) -> _Saved:
        return _Saved(self, tensor)

    def hooks(self) -> Any:
        return torch.autograd.graph.saved_tensors_hooks(self._pack, lambda saved: saved.tensor)


class _Saved:
    def __init__(self, held: Held, tensor: torch.Tensor) -> None:
        self.held, self.tensor = held, tensor
        self.pointer = tensor.untyped_storage().data_ptr()
        if self.pointer not in held.weights:
            held.live[self.pointer] = tensor.untyped_storage().nbytes()
            held.most = max(held.most, sum(held.live.values()))

    def __del__(self) -> None:
        self.held.live.pop(self.pointer, None)


def step(objective: Objective, batch: Batch, size: int | None) -> tuple[float, dict[str, torch.Tensor], int]:
    """Loss, gradients, and the bytes that were held for the backward passes."""
    held = Held(objective)
    torch.manual_seed(1)
    with held.hooks():
        cache = GradientCache(objective, batch, NOW, size) if size is not None else None
        losses = objective.losses(cache.outputs if cache else objective.represent(batch, NOW))
        losses.total.backward()
        if cache:
            cache.backward()
    gradients = {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}
    objective.zero_grad()
    return losses.total.item(), gradients, held.most


@pytest.mark.parametrize("size", [1, 3, 8])
def test_gradients_are_those_of_the_whole_batch(tiny_recipe: Path, registry: Registry, size: int) -> None:
    """COSMOS, on 8 samples whose texts have unequal lengths. Would catch embeddings of other samples, a part that is
    left out or counted twice, and a fusion without gradient."""
    recipe = load_recipe(tiny_recipe, registry=registry)
    torch.manual_seed(0)
    objective, batch = build_objective(recipe), example_batch(recipe, 8)
    loss, whole, _ = step(objective, batch, None)
    own_loss, own, _ = step(objective, batch, size)
    assert own_loss == pytest.approx(loss, rel=1e-6)
    assert set(own) == set(whole)
    for name, gradient in whole.items():
        torch.testing.assert_close(own[name], gradient, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def test_two_losses_of_one_cache_add_up(tiny_recipe: Path, registry: Registry) -> None:
    """Would catch the first loss's gradients of the embeddings, taken on once more with those of the second."""
    recipe = load_recipe(tiny_recipe, registry=registry)
    torch.manual_seed(0)
    objective, batch = build_objective(recipe), example_batch(recipe, 8)
    _, whole, _ = step(objective, batch, 3)
    cache = GradientCache(objective, batch, NOW, 3)
    for name in ("contrastive", "cross_modal_distillation"):
        objective.losses(cache.outputs).terms[name].backward()
        cache.backward()
    for name, p in objective.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(
                p.grad, whole[name], rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
            )


def test_the_second_pass_draws_what_the_first_one_drew(tiny_recipe: Path, registry: Registry) -> None:
    """With paths dropped at random: the embeddings of the second pass are those that the losses saw."""
    recipe = load_recipe(tiny_recipe, registry=registry, overrides=["backbone.image.drop_path=0.5"])
    objective = build_objective(recipe)
    objective.train()
    seen: list[torch.Tensor] = []
    objective.backbone["image"].register_forward_hook(lambda module, args, out: seen.append(out.pooled.detach()))
    cache = GradientCache(objective, example_batch(recipe, 6), NOW, 2)
    objective.losses(cache.outputs).total.backward()
    state = torch.get_rng_state()
    cache.backward()
    first, second = seen[:3], seen[3:]
    assert torch.equal(torch.get_rng_state(), state)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
    again = objective.represent(cache.parts[0], NOW).student["image"].pooled
    assert not torch.equal(first[0], again), "paths are dropped at random"


@pytest.mark.slow
def test_it_holds_less(tiny_recipe: Path, registry: Registry) -> None:
    """Eight parts hold at least three times less for the backward pass."""
    recipe = load_recipe(tiny_recipe, registry=registry)
    objective, batch = build_objective(recipe), example_batch(recipe, 32)
    _, _, whole = step(objective, batch, None)
    _, _, parts = step(objective, batch, 4)
    assert parts < whole / 3


class Pixels(Loss):
    """The size of the pixels that the tower takes, times the embedding's first number."""

    name = "pixels"

    @classmethod
    def needs(cls, config: Any, plan: Plan) -> Needs:
        return Needs(student=("image",), raw=("image",))

    def forward(self, outputs: Outputs) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        pixels = outputs.views["image"].groups[0].x.float().abs().mean()
        return {"pixels": pixels * outputs.student["image"].embedding[..., 0].mean()}, {}


class Attends(Loss):
    """Reads how the teacher attends."""

    name = "attends"

    @classmethod
    def needs(cls, config: Any, plan: Plan) -> Needs:
        return Needs(student=("image",), attention={"default": {"image": (0,)}})

    def forward(self, outputs: Outputs) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        raise NotImplementedError


def test_losses_read_the_views_that_the_towers_take(tiny_recipe: Path, registry: Registry) -> None:
    """Catches pixels as they left the workers, in bytes, in place of those that are finished on the device."""
    more = Registry([*registry.entries.values(), Entry(Pixels, "outside", "outside")])
    recipe = load_recipe(tiny_recipe, registry=more, overrides=["loss.2=pixels"])
    objective, batch = build_objective(recipe), example_batch(recipe, 6)
    assert batch.views["image"].groups[0].x.dtype == torch.uint8
    loss, whole, _ = step(objective, batch, None)
    own_loss, own, _ = step(objective, batch, 2)
    assert own_loss == pytest.approx(loss, rel=1e-6)
    for name, gradient in whole.items():
        torch.testing.assert_close(own[name], gradient, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def test_what_reads_tokens_or_its_batch_is_refused(tiny_recipe: Path, registry: Registry) -> None:
    """Would catch wrong gradients without a word."""
    more = Registry([*registry.entries.values(), Entry(Attends, "outside", "outside")])
    with pytest.raises(RecipeErrors, match=r"'attends' reads tokens, which train\.parallel\.micro_batch does not keep"):
        load_recipe(tiny_recipe, registry=more, overrides=["train.parallel.micro_batch=2", "loss.2=attends"])
    with pytest.raises(RecipeErrors, match=r"'flair' reads tokens, which train\.parallel\.micro_batch does not keep"):
        load_recipe(
            tiny_recipe,
            registry=registry,
            overrides=["train.parallel.micro_batch=2", "fusion=text_conditioned_pool", "loss=[flair]", "teacher=null"],
        )
    recipe = load_recipe(tiny_recipe, registry=registry)
    objective = build_objective(recipe)
    objective.backbone["image"].add_module("norm_of_batch", torch.nn.BatchNorm1d(4))
    with pytest.raises(UserError, match=r"micro_batch: backbone\.image\.norm_of_batch computes with statistics"):
        lay_out(objective, ParallelConfig(micro_batch=2), torch.device("cpu"))
