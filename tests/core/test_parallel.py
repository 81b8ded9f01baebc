"""Compiled units: one graph each, the numbers of the eager step, names as they were."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distill_core.data.example import example_batch
from distill_core.objective import Objective
from distill_core.outputs import Progress
from distill_core.parallel import compile_units, lay_out
from distill_core.recipe.build import build_objective
from distill_core.recipe.resolve import load_recipe
from distill_core.recipe.sections import ParallelConfig
from distill_core.registry import Registry


def gradients(objective: Objective, batch: Any) -> tuple[float, dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    losses = objective.losses(objective.represent(batch, Progress(0, 9)))
    losses.total.backward()
    own = {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}
    objective.zero_grad()
    return losses.total.item(), own


@pytest.mark.slow
def test_compiled_units_compute_the_eager_step(tiny_recipe: Path, registry: Registry) -> None:
    """COSMOS, with packed crops of two sizes and packed texts, traced as for inductor.

    Would catch a graph break (`fullgraph`), a block entered by anything but `forward` (no graph), wrong gradients of
    the attention's operator, and renamed parameters.
    """
    torch._dynamo.reset()
    recipe = load_recipe(tiny_recipe, registry=registry)
    torch.manual_seed(0)
    objective, batch = build_objective(recipe), example_batch(recipe, 4)
    names = list(objective.state_dict())
    loss, eager = gradients(objective, batch)
    torch._dynamo.utils.counters.clear()
    assert compile_units(objective, "aot_eager") == 2 * (2 + 1)  # blocks of image and text, student and teacher
    compiled_loss, compiled = gradients(objective, batch)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 4
    assert not torch._dynamo.utils.counters["graph_break"]
    assert list(objective.state_dict()) == names
    assert compiled_loss == pytest.approx(loss, rel=1e-5)
    for name, gradient in eager.items():
        torch.testing.assert_close(
            compiled[name], gradient, rtol=1e-3, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.slow
def test_texts_of_other_lengths_are_the_same_graph(tiny_recipe: Path, registry: Registry) -> None:
    """Would catch lengths that are constants of a graph: a compilation at each step."""
    torch._dynamo.reset()
    recipe = load_recipe(tiny_recipe, registry=registry, overrides=["teacher=null", "loss=[{name: contrastive}]"])
    objective = build_objective(recipe)
    compile_units(objective, "aot_eager")
    counts = []
    for size in (2, 3, 4, 5, 6):
        gradients(objective, example_batch(recipe, size))
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert counts[-1] == counts[-2] == counts[-3], counts


class LiveStorages(TorchDispatchMode):
    """While it is entered, notes what operators make; `bytes` is of what is still held."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return out

    @property
    def bytes(self) -> int:
        return sum(size for reference, size in self.made.values() if not reference.expired())


def held(objective: Objective, batch: Any) -> int:
    """Bytes that the forward pass holds for the backward pass."""
    with LiveStorages() as live:
        losses = objective.losses(objective.represent(batch, Progress(0, 9)))
    size = live.bytes
    losses.total.backward()
    return size


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_checkpointed_units_hold_less_and_compute_the_same(
    tiny_recipe: Path, registry: Registry, compiled: bool
) -> None:
    """Would catch a policy that keeps everything, activations that are computed again with other random numbers, and
    renamed parameters."""
    recipe = load_recipe(
        tiny_recipe,
        registry=registry,
        overrides=["backbone.image.layers=4", "teacher=null", "loss=[{name: contrastive}]"],
    )
    batch, memory, steps = example_batch(recipe, 8), {}, {}
    for kind in ("none", "selective", "full"):
        torch._dynamo.reset()
        torch.manual_seed(0)
        objective = build_objective(recipe)
        names = list(objective.state_dict())
        lay_out(objective, ParallelConfig(checkpointing=kind), torch.device("cpu"))
        if compiled:
            compile_units(objective, "aot_eager")
        steps[kind] = gradients(objective, batch)
        memory[kind] = 0 if compiled else held(objective, batch)
        assert list(objective.state_dict()) == names
        assert steps[kind][0] == pytest.approx(steps["none"][0], rel=1e-5)
        for name, gradient in steps["none"][1].items():
            torch.testing.assert_close(steps[kind][1][name], gradient, rtol=1e-3, atol=1e-5)
    assert compiled or memory["full"] < 0.5 * memory["selective"] < 0.4 * memory["none"]
