"""`train.parallel`: compiled runs, torch's own modules, what is not one graph; checkpointing. (Each method's step,
compiled: tests/recipes/test_compile.py.)"""

import copy
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distill_core import parallel
from distill_core.batch import Batch
from distill_core.data.example import example_batch
from distill_core.errors import UserError
from distill_core.interfaces import Loss, LossConfig
from distill_core.objective import Objective
from distill_core.outputs import Outputs, Progress
from distill_core.parallel import checkpoint_unit, compile_unit, compile_units, lay_out
from distill_core.recipe.build import build_objective
from distill_core.recipe.resolve import load_recipe
from distill_core.recipe.sections import ParallelConfig, Recipe
from distill_core.registry import Entry, Registry
from distill_core.run.folder import RunFolder
from distill_core.train import Trainer

COMPILED = ("train.parallel.compile=true", "evaluate=null")


@pytest.fixture(autouse=True)
def traced_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Traced as for inductor, but run operator by operator: nothing waits for a C++ compiler."""
    monkeypatch.setattr(parallel, "compile_units", lambda objective: compile_units(objective, "aot_eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    assert not torch._dynamo.utils.counters["graph_break"]
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)),
        lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True),
    ],
    ids=["sequential", "encoder_layer"],
)
@pytest.mark.slow
def test_modules_of_torch_are_units(make: Any) -> None:
    """Three of them, at several lengths: one graph of a length, and one of any, serve them all. Would catch torch
    skipping frames of its own, which with `fullgraph` is an error, and a compilation for each block of a tower."""
    units = [make() for _ in range(3)]
    inputs = [torch.randn(2, length, 8) for length in (5, 7, 9)]
    names = list(units[0].state_dict())
    expected = [[unit(x) for x in inputs] for unit in units]
    for unit in units:
        parallel.compile_unit(unit, "aot_eager")
    for unit, outs in zip(units, expected, strict=True):
        for x, out in zip(inputs, outs, strict=True):
            torch.testing.assert_close(unit(x), out)
    assert graphs() == 2
    assert list(units[0].state_dict()) == names


def run_of(recipe: Recipe, folder: RunFolder, *, stop_at: int | None = None, resume: bool = False) -> Trainer:
    """Trained to its end, or to a signal after `stop_at` steps."""
    trainer = Trainer(recipe, folder, quiet=True, resume="last" if resume else None)
    next_batch = trainer.lockstep.next_batch

    def stopping() -> Batch | None:
        if trainer.state.step == stop_at:
            trainer.interrupt.signal = signal.SIGTERM
        return next_batch()

    trainer.lockstep.next_batch = stopping  # type: ignore[method-assign]
    trainer.run()
    return trainer


@pytest.mark.slow
def test_a_compiled_run_is_resumed_exactly(tiny_recipe: Path, registry: Registry, tmp_path: Path) -> None:
    """COSMOS, stopped after half of its steps; beside it the eager run. Would catch names of parameters that
    compilation changes, so that no checkpoint fits, and state that only the compiled run holds."""
    eager = load_recipe(tiny_recipe, registry=registry, overrides=["evaluate=null"])
    recipe = load_recipe(tiny_recipe, registry=registry, overrides=COMPILED)
    names = list(run_of(eager, RunFolder.create(tmp_path / "eager", eager)).objective.state_dict())
    assert graphs() == 0
    whole = run_of(recipe, RunFolder.create(tmp_path / "whole", recipe)).objective.state_dict()
    assert graphs() > 3
    folder = RunFolder.create(tmp_path / "parts", recipe)
    assert run_of(recipe, folder, stop_at=2).state.step == 2
    resumed = run_of(recipe, RunFolder(folder.path), resume=True)
    assert resumed.state.step == 4
    parts = resumed.objective.state_dict()
    assert list(parts) == list(whole) == names
    assert [name for name, x in whole.items() if not torch.equal(x, parts[name])] == []


class Square(Loss):
    """Of the images' embeddings."""

    name = "square"
    Config = LossConfig

    def __init__(self, config: Any, plan: Any) -> None:
        super().__init__(config, plan)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, outputs: Outputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return {self.name: self.scale * outputs.student["image"].pooled.square().mean()}, {}


@pytest.mark.slow
def test_the_trainer_compiles_with_inductor(
    tiny_recipe: Path, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps, the second of which reads what the first has made of the weights: the eager losses. Not the eager
    weights: AdamW makes full steps of gradients that are rounding. Would catch a backend that is not torch's own
    default, and generated code that fails under the trainer. One tower, one length: compiling is what takes long."""
    monkeypatch.setenv("SETUPTOOLS_USE_DISTUTILS", "stdlib")  # which another test may have imported
    monkeypatch.setattr(parallel, "compile_units", compile_units)
    mine = Registry([*registry.entries.values(), Entry(Square, "mine", "mine")])
    text = tiny_recipe.read_text(encoding="utf-8")
    tiny_recipe.write_text(re.sub(r"(?m)^  text: .*\n", "", text).replace("local: 1}", "local: 0}"), encoding="utf-8")
    small = ["loss=[{name: square}]", "fusion=null", "teacher=null", "evaluate=null", "backbone.image.layers=1"]
    rows = {}
    for compiled in (False, True):
        recipe = load_recipe(
            tiny_recipe, registry=mine, overrides=[*small, "train.steps=2", f"train.parallel.compile={compiled}"]
        )
        folder = RunFolder.create(tmp_path / str(compiled), recipe)
        run_of(recipe, folder)
        rows[compiled] = [row["loss"] for row in folder.rows()]
    assert graphs() == 2  # of the block, and of the loss
    assert rows[True] == pytest.approx(rows[False], rel=1e-4)
    assert len(set(rows[True])) == 2


class Reads(Square):
    """Not one graph: it branches on a value."""

    name = "reads"

    def forward(self, outputs: Outputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        terms, metrics = super().forward(outputs)
        total = terms[self.name]
        return {self.name: -total if total.item() > 1e6 else total}, metrics


def test_what_is_not_one_graph_is_named(tiny_recipe: Path, registry: Registry, tmp_path: Path) -> None:
    """Would catch pages of a tracer's output in place of the line, and of what to do."""
    mine = Registry([*registry.entries.values(), Entry(Reads, "mine", "mine")])
    overrides = [*COMPILED, "loss=[{name: reads}]", "fusion=null", "teacher=null", "train.steps=1"]
    recipe = load_recipe(tiny_recipe, registry=mine, overrides=overrides)
    trainer = Trainer(recipe, RunFolder.create(tmp_path / "runs", recipe), quiet=True)
    with pytest.raises(UserError, match=r"(?s)parallel\.compile: .*test_parallel\.py:\d+.*compile=false"):
        trainer.run()


def gradients(objective: Objective, batch: Any) -> tuple[float, dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    losses = objective.losses(objective.represent(batch, Progress(0, 9)))
    losses.total.backward()
    own = {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}
    objective.zero_grad()
    return losses.total.item(), own


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


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_checkpointed_unit_may_be_called_twice_under_autocast(compiled: bool) -> None:
    """As the decoder of parallel captioning. Catches weights that autocast casts once and computing again casts twice,
    which ended such runs in the first backward pass."""
    torch.manual_seed(0)
    unit, x = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.GELU(), torch.nn.Linear(6, 6)), torch.randn(5, 6)
    gradients = []
    for kind in (None, False, True):
        again = copy.deepcopy(unit)
        if kind is not None:
            checkpoint_unit(again, selective=kind)
        if compiled:
            compile_unit(again, "aot_eager")
        with torch.autocast("cpu", torch.bfloat16):
            total = again(x).float().sum() + again(2 * x).float().sum()
        total.backward()
        gradients.append([p.grad for p in again.parameters()])
    for mine in gradients[1:]:
        torch.testing.assert_close(mine, gradients[0], rtol=2e-2, atol=2e-2)


CALLS: list[int] = []


@torch.library.custom_op("parallel_test::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    CALLS.append(1)
    return 2 * x


twice.register_autograd(lambda ctx, gradient: 2 * gradient)


class Twice(torch.nn.Module):
    """A unit that calls an operator that is not torch's own, as a kernel of attention is."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return twice(torch.exp(x)).sin()


@pytest.mark.parametrize(("selective", "calls"), [(True, 1), (False, 2)])
def test_selective_checkpointing_calls_kernels_once(selective: bool, calls: int) -> None:
    """Would catch a GPU's attention that is computed again, where its result was to be kept."""
    unit, x = Twice(), torch.ones(3, requires_grad=True)
    checkpoint_unit(unit, selective=selective)
    CALLS.clear()
    unit(x).sum().backward()
    assert len(CALLS) == calls
    torch.testing.assert_close(x.grad, 2 * x.exp().detach() * torch.cos(2 * x.exp()).detach())
