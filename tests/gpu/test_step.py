"""A step of recipes/cosmos_tiny.yaml on a GPU: beside the CPU's, in bf16, with the kernels that should run, resumed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from distill_core.batch import Batch
from distill_core.data.example import example_batch
from distill_core.objective import Objective
from distill_core.outputs import Progress
from distill_core.recipe.build import build_objective
from distill_core.recipe.resolve import load_recipe
from distill_core.recipe.sections import Recipe
from distill_core.registry import Registry
from distill_core.run.folder import RunFolder
from distill_core.step import TrainStep
from distill_core.system.process import set_matmul_precision
from distill_core.train import Trainer
from distill_kernels.choices import recorded

TINY = Path(__file__).resolve().parents[2] / "recipes" / "cosmos_tiny.yaml"
SAMPLES = 16
START = Progress(0, 1000)

# fp32 on both sides, summed in another order: relative to a loss, and to the norm of a parameter's gradient. A gradient
# that is zero in mathematics (a key's bias) is rounding noise: absolute, relative to the largest gradient's norm.
LOSS, GRADIENT, NOISE = 1e-5, 1e-3, 1e-6


def tiny(registry: Registry, *overrides: str) -> Recipe:
    return load_recipe(TINY, registry=registry, overrides=overrides)


def made(recipe: Recipe) -> tuple[Objective, Batch]:
    """On the CPU, the same for each call."""
    torch.manual_seed(0)
    return build_objective(recipe), example_batch(recipe, SAMPLES)


def step(
    objective: Objective, batch: Batch, device: torch.device, precision: str
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Losses' terms and gradients, on the CPU."""
    objective.to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        losses = objective.losses(objective.represent(batch.to(device), START))
    losses.total.backward()
    terms = {name: term.item() for name, term in losses.terms.items()}
    gradients = {name: p.grad.float().cpu() for name, p in objective.named_parameters() if p.grad is not None}
    return terms, gradients


def differences(ours: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """Of each gradient, relative to its norm and to `NOISE` of the largest."""
    assert ours.keys() == truth.keys()
    largest = max(t.norm().item() for t in truth.values())
    return {
        name: (ours[name] - t).norm().item() / (t.norm().item() + NOISE / GRADIENT * largest)
        for name, t in truth.items()
    }


def test_fp32_as_on_the_cpu(registry: Registry, gpu: torch.device) -> None:
    recipe = tiny(registry, "train.precision=fp32")
    set_matmul_precision("highest")
    terms, gradients = step(*made(recipe), torch.device("cpu"), "fp32")
    ours, our_gradients = step(*made(recipe), gpu, "fp32")
    assert ours == pytest.approx(terms, rel=LOSS)
    worst = differences(our_gradients, gradients)
    assert max(worst.values()) < GRADIENT, sorted(worst.items(), key=lambda item: -item[1])[:5]


@pytest.mark.usefixtures("ampere")
def test_tf32_is_near_fp32(registry: Registry, gpu: torch.device) -> None:
    """What `matmul_precision: high` costs: towers' products keep 10 bits, so 2^-11 a product, in eight blocks."""
    recipe = tiny(registry, "train.precision=fp32")
    set_matmul_precision("highest")
    terms, _ = step(*made(recipe), gpu, "fp32")
    set_matmul_precision("high")
    ours, _ = step(*made(recipe), gpu, "fp32")
    assert ours == pytest.approx(terms, rel=5e-3)


@pytest.mark.usefixtures("ampere")
def test_bf16_step_and_the_kernels_that_run(registry: Registry, gpu: torch.device) -> None:
    """Finite and near fp32; weights stay fp32; and each op's backend is the one for a GPU, launched."""
    recipe = tiny(registry)
    assert recipe.train.precision == "bf16"
    set_matmul_precision(recipe.train.matmul_precision)
    exact, _ = step(*made(recipe), gpu, "fp32")
    objective, batch = made(recipe)
    objective.to(gpu)
    update, batch = TrainStep(recipe, objective, gpu), batch.to(gpu)
    with recorded() as choices:
        first = update(batch, START)
    assert first.finite
    assert first.terms == pytest.approx(exact, rel=0.05)
    assert {p.dtype for p in objective.parameters()} == {torch.float32}
    assert {(c.op, c.backend) for c in choices} == {
        ("packed_attention", "varlen"),
        ("self_attention", "sdpa"),
        ("cross_attention_pool", "projected"),
        ("cross_attention", "triton"),
        ("multi_view_info_nce", "triton"),
    }

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as record:
        assert update(batch, Progress(1, 1000)).finite
        torch.cuda.synchronize(gpu)
    launched = {event.key for event in record.key_averages()}
    for kernel in ("cross_attention_forward", "cross_attention_backward", "row_kernel", "gradient_kernel"):
        assert any(kernel in name for name in launched), kernel


@pytest.mark.parametrize("name", ["cosmos_sigmoid_tiny", "siglip_tiny", "clip_tiny"])
@pytest.mark.usefixtures("ampere")
def test_other_recipes_make_a_step(registry: Registry, gpu: torch.device, name: str) -> None:
    """Would catch a loss or a tower that reads a tensor of the CPU."""
    recipe = load_recipe(TINY.with_name(f"{name}.yaml"), registry=registry)
    set_matmul_precision(recipe.train.matmul_precision)
    objective, batch = made(recipe)
    objective.to(gpu)
    assert TrainStep(recipe, objective, gpu)(batch.to(gpu), START).finite


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in RunFolder(folder).rows() if "loss" in row]


def test_resume(registry: Registry, tiny_recipe: Path, tmp_path: Path) -> None:
    """Two steps, saved, and two more: what four in one run give (relative: some of CUDA's sums have no fixed order)."""

    def train(folder: Path | None, *overrides: str) -> Path:
        common = ("train.device=cuda", "train.schedule={name: constant}", "evaluate=null")
        recipe: Recipe = load_recipe(tiny_recipe, registry=registry, overrides=[*common, *overrides])
        run = RunFolder.create(tmp_path / "runs", recipe) if folder is None else RunFolder(folder)
        Trainer(recipe, run, resume=None if folder is None else "last", quiet=True).run()
        return run.path

    whole = losses(train(None, "train.steps=4"))
    parts = losses(train(train(None, "train.steps=2"), "train.steps=4"))
    assert len(whole) == len(parts) == 4
    assert parts == pytest.approx(whole, rel=1e-4)
    assert len(set(whole)) == 4


@pytest.mark.parametrize("finite", [True, False])
def test_the_teacher_moves_as_on_the_cpu(registry: Registry, gpu: torch.device, finite: bool) -> None:
    """By other operators there. Would catch a weight that goes the wrong way, and a step that is not finite."""
    teachers = []
    for device in (torch.device("cpu"), gpu):
        objective, _ = made(tiny(registry))
        objective.to(device)
        with torch.no_grad():
            for parameter in objective.backbone.parameters():
                parameter.add_(1)
        teacher: Any = objective.teachers["default"]
        teacher.move(START, torch.tensor(finite, device=device))
        teachers.append([p.cpu() for p in objective.teacher.parameters()])
    torch.testing.assert_close(*teachers)
