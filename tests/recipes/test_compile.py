"""Compiled, each method makes the eager step: one graph a unit, none again for other texts, names as they were."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from other_runs import stand_ins
from torch import Tensor

from distill_core.batch import Batch
from distill_core.data.example import example_batch
from distill_core.objective import Objective
from distill_core.outputs import Progress
from distill_core.parallel import compile_units
from distill_core.recipe.build import build_objective
from distill_core.recipe.resolve import load_recipe
from distill_core.recipe.sections import Recipe
from distill_core.registry import Registry
from distill_vl.tokenizer import VOCABULARY

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2] / "recipes"
TINY = sorted(ROOT.glob("*_tiny.yaml"))
DATA = ("data.source={name: webdataset, urls: x.tar, test: y.tar}", "evaluate=null")


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def other_texts(batch: Batch, seed: int) -> Batch:
    """The texts that are not masked, cut to other lengths: end-of-text moves forward."""
    draw = np.random.default_rng(seed)
    for group in batch.views["text"].groups if "text" in batch.views else ():
        if group.token_mask is not None or group.lengths is None:
            continue
        ids, lengths = group.x.clone(), group.lengths.copy()
        for at in np.ndindex(lengths.shape):
            lengths[at] = n = int(draw.integers(3, lengths[at] + 1))
            ids[at][n - 1], ids[at][n:] = VOCABULARY - 1, 0
        group.x, group.lengths = ids[..., : lengths.max()], lengths
    return batch


def step(recipe: Recipe, objective: Objective, number: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Terms and metrics, and gradients, of a batch that differs with the step."""
    batch, progress = other_texts(example_batch(recipe, 4), number), Progress(number, 20)
    torch.manual_seed(number)
    outputs = objective.represent(batch, progress)
    losses = objective.losses(outputs)
    losses.total.backward()
    objective.after_step(outputs, progress)
    gradients = {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}
    objective.zero_grad()
    return losses.terms | losses.metrics, gradients


def compare(compiled: tuple[dict[str, Tensor], ...], eager: tuple[dict[str, Tensor], ...]) -> None:
    (values, gradients), (expected, expected_gradients) = compiled, eager
    assert values.keys() == expected.keys()
    for name, value in values.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")
    assert gradients.keys() == expected_gradients.keys()
    scale = max(gradient.norm().item() for gradient in expected_gradients.values())
    for name, gradient in expected_gradients.items():
        off = (gradients[name] - gradient).norm().item()
        assert off <= 1e-4 * gradient.norm().item() + 1e-7 * scale, f"{name}: off by {off}"


@pytest.mark.parametrize("path", TINY, ids=[path.stem for path in TINY])
def test_compiled_is_eager(path: Path, registry: Registry) -> None:
    """Towers, fusion and losses of every recipe, over steps whose texts, masks and temperatures differ.

    Would catch a graph break (`fullgraph`), a unit that is entered by anything but `forward` (no graph), a length or a
    schedule that is a constant of a graph (a compilation at each step), state that a trace does not move (a centre),
    and renamed parameters.
    """
    recipe = load_recipe(path, registry=registry, overrides=[*DATA, *stand_ins(path)])
    torch.manual_seed(0)
    objective = build_objective(recipe)
    start = {name: x.clone() for name, x in objective.state_dict().items()}
    eager = [step(recipe, objective, number) for number in range(4)]
    objective.load_state_dict(start)
    units = compile_units(objective, "aot_eager")
    assert units >= sum(len(loss.units()) for loss in objective.loss.values()) > 0
    counts = []
    for number in range(10):
        made = step(recipe, objective, number)
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        if number < len(eager):
            compare(made, eager[number])
    assert counts[0] > len(objective.loss)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert counts[-1] == counts[3], f"graphs after each step: {counts}"
    assert list(objective.state_dict()) == list(start)


def test_inductor_makes_the_eager_step(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """COSMOS as it is compiled in training. Would catch what only generated code gets wrong."""
    monkeypatch.setenv("SETUPTOOLS_USE_DISTUTILS", "stdlib")  # which another test may have imported
    recipe = load_recipe(ROOT / "cosmos_tiny.yaml", registry=registry, overrides=DATA)
    torch.manual_seed(0)
    objective = build_objective(recipe)
    eager = [step(recipe, objective, number) for number in range(2)]
    assert compile_units(objective) > 3
    for number in range(2):
        compare(step(recipe, objective, number), eager[number])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 3
    assert not torch._dynamo.utils.counters["graph_break"]
