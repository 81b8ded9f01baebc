"""Our collectives over NCCL with one rank, which takes no short cut: what it refuses of dtypes and layouts shows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from distill_core.data.example import example_batch
from distill_core.outputs import Progress
from distill_core.recipe.build import build_objective
from distill_core.recipe.resolve import load_recipe
from distill_core.registry import Registry
from distill_core.step import TrainStep
from distill_core.system import distributed

TINY = Path(__file__).resolve().parents[2] / "recipes" / "cosmos_tiny.yaml"
SAMPLES = 16


class Several(int):
    """A number of ranks that is 1, and yet not equal to it: nothing is left out."""

    def __eq__(self, other: object) -> bool:
        return False

    __hash__ = int.__hash__


@pytest.fixture
def ranks(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if not dist.is_nccl_available():
        pytest.skip("this torch has no NCCL")
    torch.cuda.set_device(gpu)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    with monkeypatch.context() as patched:
        patched.setattr(distributed, "world_size", lambda: Several(1))
        yield
    dist.destroy_process_group()


@pytest.mark.parametrize("wire", [None, torch.bfloat16])
@pytest.mark.usefixtures("ranks")
def test_gather(gpu: torch.device, wire: torch.dtype | None) -> None:
    """Forward and backward, of two dtypes and along the second dimension."""
    x, y = (torch.randn(2, 3, 5, device=gpu, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    leaves = [x.requires_grad_(), y.requires_grad_()]
    gathered = distributed.all_gather_together(leaves, 1, wire)
    for ours, leaf in zip(gathered, leaves, strict=True):
        torch.testing.assert_close(ours, leaf, rtol=0, atol=0)  # a rank's own rows are not rounded
    gradients = torch.autograd.grad(sum((g.float() ** 2).sum() for g in gathered), leaves)
    for gradient, leaf in zip(gradients, leaves, strict=True):
        torch.testing.assert_close(gradient, 2 * leaf, rtol=2e-2, atol=1e-3)


@pytest.mark.usefixtures("ranks")
def test_flags_and_means(gpu: torch.device) -> None:
    for flag in (True, False):
        on_device = torch.tensor(flag, device=gpu)
        assert distributed.any_rank_on_device(on_device).item() is flag
        assert distributed.any_rank(flag) is flag
    used, unused, half = (nn.Parameter(torch.randn(3, 4, device=gpu)) for _ in range(3))
    half.data = half.data.bfloat16()
    for parameter in (used, half):
        parameter.grad = torch.ones_like(parameter)
    distributed.average_gradients([used, unused, half])
    assert unused.grad is None
    for parameter in (used, half):
        torch.testing.assert_close(parameter.grad, torch.ones_like(parameter))
    module = nn.Linear(3, 2, device=gpu)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    distributed.broadcast(module)
    torch.testing.assert_close(dict(module.state_dict()), before)


def step(registry: Registry, gpu: torch.device) -> tuple[dict[str, float], list[Tensor]]:
    recipe = load_recipe(TINY, registry=registry, overrides=["train.precision=fp32", "train.schedule={name: constant}"])
    torch.manual_seed(0)
    objective, batch = build_objective(recipe), example_batch(recipe, SAMPLES)
    objective.to(gpu)
    result = TrainStep(recipe, objective, gpu)(batch.to(gpu), Progress(0, 1000))
    assert result.finite
    return result.terms, [p.detach() for p in objective.parameters()]


def test_a_step_is_that_without_a_group(registry: Registry, gpu: torch.device, request: pytest.FixtureRequest) -> None:
    """Losses of gathered rows, averaged gradients, flags: over one rank all of it changes nothing."""
    terms, parameters = step(registry, gpu)
    request.getfixturevalue("ranks")
    ours, our_parameters = step(registry, gpu)
    assert ours == pytest.approx(terms, rel=1e-4)
    # Adam's first step is the sign of the gradient: of one that is rounding noise, either
    for mine, other in zip(our_parameters, parameters, strict=True):
        assert (mine - other).abs().gt(1e-4).float().mean() < 0.02
