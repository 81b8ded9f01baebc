"""What a step costs without values, against a real step: FLOPs, memory held, memory at its highest."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_iter

from distill_core import Batch, Loss, LossConfig, Needs, Objective, Outputs, Plan, Progress
from distill_core.errors import UserError
from distill_core.gradient_cache import GradientCache
from distill_core.parallel import lay_out
from distill_core.recipe.build import build_objective
from distill_core.recipe.resolve import load_recipe
from distill_core.recipe.sections import ParallelConfig, Recipe
from distill_core.registry import Entry, Registry
from distill_core.system.without_values import WithoutValues
from distill_scale.live_bytes import LiveBytes
from distill_scale.step_costs import (
    Checkpointing,
    StepCosts,
    batch_of_examples,
    check_tokens,
    costs_of_steps,
    example_lengths,
    measured_steps,
)

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
CPU = torch.device("cpu")


def recipe_of(registry: Registry, name: str, *overrides: str) -> Recipe:
    return load_recipe(RECIPES / f"{name}.yaml", registry=registry, overrides=overrides, allow_unset=True)


def real(recipe: Recipe, size: int, checkpointing: Checkpointing = "none") -> tuple[Objective, Batch]:
    torch.manual_seed(0)
    objective = build_objective(recipe)
    objective.trainable(recipe.freeze, recipe.train.lr_factors)
    lay_out(objective, ParallelConfig(checkpointing=checkpointing), CPU)
    return objective, batch_of_examples(recipe, size)


def costs_of_step(
    recipe: Recipe,
    size: int,
    *,
    device: torch.device = CPU,
    ranks: int = 1,
    checkpointing: Checkpointing = "none",
) -> StepCosts:
    return costs_of_steps(recipe, size, [ranks], device=device, checkpointing=checkpointing)[ranks]


def saved_bytes(recipe: Recipe, objective: Objective, batch: Batch) -> int:
    """What a real step saves for its backward pass, weights and batch apart: each storage once."""
    apart = {x.untyped_storage()._cdata for x in tensors(objective, batch)}
    saved: dict[int, Tensor] = {}

    def save(x: Tensor) -> Tensor:
        saved[x.untyped_storage()._cdata] = x
        return x

    bf16 = torch.autocast("cpu", torch.bfloat16, enabled=recipe.train.precision == "bf16")
    with torch.autograd.graph.saved_tensors_hooks(save, lambda x: x), bf16:
        total = objective.losses(objective.represent(batch, Progress(0, 1))).total
    assert total.requires_grad
    return sum(x.untyped_storage().nbytes() for key, x in saved.items() if key not in apart)


def peak(live: LiveBytes) -> int:
    """The most bytes that were alive at a time."""
    return max(others + gradients for others, gradients in live.history)


def tensors(objective: Objective, batch: Batch) -> Iterator[Tensor]:
    yield from (*objective.parameters(), *objective.buffers())
    yield from (group.x for views in batch.views.values() for group in views.groups)


@pytest.mark.slow
def test_as_a_step_whose_losses_are_not_cut_off(registry: Registry) -> None:
    """What is alive at most in one backward pass from losses to towers, with other ranks too; the number of ranks that
    ran before changes nothing."""
    recipe = recipe_of(registry, "cosmos_tiny")
    planned = costs_of_steps(recipe, 16, [1, 64], device=CPU)
    objective, batch = real(recipe, 16)
    bf16 = torch.autocast("cpu", torch.bfloat16, enabled=recipe.train.precision == "bf16")
    with LiveBytes(objective.parameters(), [*tensors(objective, batch)]) as live:
        with bf16:
            outputs = objective.represent(batch, Progress(0, 1))
            total = objective.losses(outputs).total
        held = live.now
        total.backward()
    assert planned[1].peak() == pytest.approx(peak(live), rel=0.02)
    assert planned[1].held == pytest.approx(held, rel=0.02)
    alone = costs_of_step(recipe, 16, ranks=64)
    assert (planned[64].flops, planned[64].gathered) == (alone.flops, alone.gathered)
    assert planned[64].peak_of_losses == pytest.approx(alone.peak_of_losses, rel=0.01)
    assert planned[64].peak_of_losses > 2 * planned[1].peak_of_losses
    assert planned[64].peak_of_towers() == pytest.approx(planned[1].peak_of_towers(), rel=0.01)


@pytest.mark.slow
def test_as_a_step_in_micro_batches(registry: Registry) -> None:
    """`train.parallel.micro_batch`, on tensors without values too: the losses of the whole batch beside no graph of the
    towers, then micro-batches beside all gradients."""
    recipe = recipe_of(registry, "cosmos_tiny", "backbone.image.layers=4")
    whole, part = costs_of_step(recipe, 64), costs_of_step(recipe, 8)
    without = WithoutValues()
    objective = without.build(lambda: build_objective(recipe))
    objective.trainable(recipe.freeze, recipe.train.lr_factors)
    batch = batch_of_examples(recipe, 64, without)
    with LiveBytes(objective.parameters(), [*tensors(objective, batch)]) as live, without:

        def bf16() -> torch.autocast:
            return torch.autocast("cpu", torch.bfloat16, enabled=recipe.train.precision == "bf16")

        cache = GradientCache(objective, batch, Progress(0, 1), 8, bf16)
        with bf16():
            total = objective.losses(cache.outputs).total
        total.backward()
        cache.backward()
    planned = max(part.peak_of_towers(again=True), whole.peak_of_losses) + 2 * whole.embeddings
    assert planned == pytest.approx(peak(live), rel=0.1)
    assert planned < whole.peak() / 2


def test_a_teachers_own_views_are_planned(registry: Registry) -> None:
    """At twice the side they are four times the patches. Catches a plan that gives it the student's, or nothing."""
    own = "{name: multi_crop, size: 96, local: 0}"
    plain, large = (
        costs_of_step(recipe_of(registry, "dino_tiny", *changes), 4).flops["teacher"]
        for changes in ((), (f"teacher={{augment: {{image: {own}}}}}",))
    )
    assert 4 < large / plain < 5


def test_pixels_take_no_memory(registry: Registry) -> None:
    """A batch of thousands is planned on a laptop. Catches bytes that keep their values: what is computed of them then
    is real, before the tower's first weights."""
    recipe = recipe_of(registry, "dino_tiny")
    batch = batch_of_examples(recipe, 50_000, without := WithoutValues())  # 2.9 GB as bytes
    (first, *_) = batch.views["image"].groups
    assert (first.x.dtype, first.x.shape[1]) == (torch.uint8, 50_000)
    objective = without.build(lambda: build_objective(recipe))
    pixels = objective.on_device(batch).views["image"].groups[0].x
    assert type(first.x) is type(pixels) is FakeTensor
    assert pixels.dtype == torch.float32


METHODS = ["clip_tiny", "flava_tiny", "ibot_tiny", "siglip_tiny", "tips_tiny"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*METHODS, "cosmos_tiny"])
def test_as_a_real_step(registry: Registry, name: str) -> None:
    """FLOPs by part exactly; bytes held by what autograd saves; the most that was alive at a time."""
    recipe = recipe_of(registry, name)
    planned = costs_of_step(recipe, 16, device=CPU)
    objective, batch = real(recipe, 16)
    measured = measured_steps(recipe, objective, batch)[1]
    assert planned.flops == measured.flops
    assert planned.uncounted == ()
    assert planned.peak() == pytest.approx(measured.peak(), rel=0.02)
    assert planned.batch_bytes == sum(g.x.nbytes for views in batch.views.values() for g in views.groups)
    assert planned.held == pytest.approx(saved_bytes(recipe, objective, batch), rel=0.15)


@pytest.mark.slow
def test_as_a_real_step_that_drops_tokens(registry: Registry) -> None:
    """By a masker: FLOPs exactly, bytes as above; half the patches take about half. Catches a plan of tokens
    that the tower never sees."""
    whole = costs_of_step(recipe_of(registry, "clip_tiny"), 16)
    recipe = recipe_of(registry, "clip_tiny", "masker={image: random_drop}")
    planned = costs_of_step(recipe, 16)
    objective, batch = real(recipe, 16)
    assert batch.views["image"].groups[0].keep is not None
    measured = measured_steps(recipe, objective, batch)[1]
    assert planned.flops == measured.flops
    assert planned.peak() == pytest.approx(measured.peak(), rel=0.02)
    assert planned.held == pytest.approx(saved_bytes(recipe, objective, batch), rel=0.15)
    assert 0.45 < planned.flops["image tower"] / whole.flops["image tower"] < 0.6
    assert planned.flops["text tower"] == whole.flops["text tower"]
    assert planned.held < 0.75 * whole.held


class Gram(Loss):
    """Reads tokens of a layer in the middle, and labels."""

    name = "reads_layers"

    @classmethod
    def needs(cls, config: LossConfig, plan: Plan) -> Needs:
        return Needs(student=("image",), tokens={"image": (0,)}, layers={"image": (1,)}, fields=("label",))

    def forward(self, outputs: Outputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        tokens = outputs.student["image"].layers[1][0].float()
        weight = 1 + outputs.fields["label"].to(tokens.dtype)
        return {"gram": ((tokens @ tokens.mT).square().mean((1, 2)) * weight).mean()}, {}


@pytest.mark.slow
def test_as_a_real_step_that_reads_layers_and_fields(registry: Registry) -> None:
    """Catches FLOPs of the tower that are taken for the losses', and a loss that finds no fields."""
    mine = Registry([*registry.entries.values(), Entry(Gram, "mine", "mine")])
    overrides = ["loss.1={name: reads_layers}", "data.fields={label: {member: cls, dtype: int64}}"]
    recipe = recipe_of(mine, "clip_tiny", *overrides)
    planned = costs_of_step(recipe, 16)
    measured = measured_steps(recipe, *real(recipe, 16))[1]
    assert planned.flops == measured.flops
    image = recipe.backbone["image"].config
    patches = (image.image_size // image.patch) ** 2
    plain = costs_of_step(recipe_of(registry, "clip_tiny"), 16)
    assert planned.flops["losses"] - plain.flops["losses"] == 2 * patches**2 * image.width * 16
    assert planned.peak() == pytest.approx(measured.peak(), rel=0.02)


@pytest.mark.slow
def test_lengths_of_texts_that_are_stated(registry: Registry) -> None:
    """`--tokens`: a step on texts of that length, of which a tower that packs computes each token once. Catches an end
    of text that is lost, a width that stays, and a role that is taken for another."""
    recipe = recipe_of(registry, "cosmos_tiny", "train.precision=fp32")
    lengths = example_lengths(recipe, {"text": 30, "text.local": 10})
    assert lengths == {"text global": 30, "text local": 10}
    costs = {n: costs_of_steps(recipe, 8, [1], device=CPU, tokens={"text": n})[1] for n in (12, 24, 48)}
    flops = [made.flops["text tower"] for made in costs.values()]
    assert 1.9 < flops[1] / flops[0] < flops[2] / flops[1] < 2.2
    assert costs[48].flops["image tower"] == costs[12].flops["image tower"]
    batch = batch_of_examples(recipe, 8, tokens={"text": 24})
    for group in batch.views["text"].groups:
        assert group.x.shape[2] == 24
        assert (group.x.argmax(2) == 23).all(), "the end of a text has the highest id"
    objective, _ = real(recipe, 8)
    assert measured_steps(recipe, objective, batch)[1].flops == costs[24].flops
    with pytest.raises(UserError, match=r"--tokens texts: .*; there are text, text\.global, text\.local"):
        check_tokens([recipe], {"texts": 9})


@pytest.mark.slow
def test_a_fixed_width_of_masked_texts_stays(registry: Registry) -> None:
    """FLAVA's texts are padded to their context, and a part of the tokens is hidden."""
    recipe = recipe_of(registry, "flava_tiny")
    plain, longer = (batch_of_examples(recipe, 8, tokens=x) for x in ({}, {"text": 20}))
    for before, after in zip(plain.views["text"].groups, longer.views["text"].groups, strict=True):
        assert (after.lengths == 20).all()  # type: ignore[union-attr]
        if (before.lengths < before.x.shape[2]).all():  # type: ignore[operator]
            assert after.x.shape == before.x.shape
        if after.token_mask is not None:
            assert after.targets is not None
            assert after.hidden is not None
            assert 0 < after.token_mask.sum() < after.token_mask.numel() / 2
            assert [len(places) for places in after.hidden] == after.token_mask.flatten(1).sum(1).tolist()
    measured = measured_steps(recipe, real(recipe, 8)[0], longer)[1]
    assert costs_of_steps(recipe, 8, [1], device=CPU, tokens={"text": 20})[1].flops == measured.flops


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_as_a_real_step_that_computes_again(registry: Registry, checkpointing: Checkpointing) -> None:
    """Less is held; FLOPs grow by what is computed again: of `full` each block's forward pass but its last product."""
    recipe = recipe_of(registry, "cosmos_tiny", "backbone.image.layers=8")
    plain = costs_of_step(recipe, 16, device=CPU)
    planned = costs_of_step(recipe, 16, device=CPU, checkpointing=checkpointing)
    measured = measured_steps(recipe, *real(recipe, 16, checkpointing))[1]
    assert planned.flops == measured.flops
    assert planned.peak() == pytest.approx(measured.peak(), rel=0.02)
    assert planned.held == pytest.approx(measured.held, rel=0.02)
    again = planned.flops["backward"] - plain.flops["backward"]
    towers = planned.flops["image tower"] + planned.flops["text tower"]
    if checkpointing == "full":
        assert planned.held < plain.held / 4
        assert 0.6 * towers < again < 0.75 * towers
    else:
        assert planned.held < 0.75 * plain.held
        assert again < 0.1 * towers


@pytest.mark.slow
def test_flops_by_hand(registry: Registry) -> None:
    """A ViT's forward pass, from its shapes alone: what counter and formulas have in common would show here."""
    recipe = recipe_of(registry, "clip_tiny")
    costs = costs_of_step(recipe, 8, device=CPU)
    vit, views = recipe.backbone["image"].config, recipe.plan.modalities["image"]
    assert views.shapes is not None
    w, layers, flops = vit.width, vit.layers, 0
    for _, side, _ in views.shapes:
        patches = (side // vit.patch) ** 2
        length = patches + 1
        flops += 2 * patches * 3 * vit.patch**2 * w  # patches
        flops += (layers - 1) * (24 * length * w * w + 4 * length**2 * w)  # qkv, out, MLP; attention
        # of the last block one token's output: by the absorbed form, or by keys and values of all
        flops += 2 * w * vit.dim
    low, high = flops, flops + len(views.shapes) * (24 * length * w * w + 4 * length**2 * w)
    assert low < costs.flops["image tower"] / 8 < high


@pytest.mark.slow
def test_gathered_bytes_are_those_of_the_other_ranks(tiny_recipe: Path, registry: Registry) -> None:
    """COSMOS on 4 ranks: 3 of 4 parts of what its losses read, and of their gradients, which the teacher has not."""
    recipe = load_recipe(tiny_recipe, registry=registry)
    costs = costs_of_step(recipe, 8, device=CPU, ranks=4)
    view = 3 * 8 * 16 * 4  # of one view: three ranks' 8 rows of D = 16 in fp32
    forward, backward = costs.gathered
    assert forward % view == backward % view == 0
    student, teacher = 2 + 3 + 3, 2 * 2  # contrastive reads fewer views than there are
    assert 0 < backward <= (student + 6) * view
    assert backward < forward <= backward + teacher * view
    assert costs_of_step(recipe, 8, device=CPU).gathered == (0, 0)


@pytest.mark.slow
def test_the_kernels_of_the_device_are_planned_for(tiny_recipe: Path, registry: Registry) -> None:
    """A GPU attends without holding weights [N H, L, L]; a CPU's kernels would hold them."""
    recipe = load_recipe(tiny_recipe, registry=registry, overrides=["train.precision=bf16"])
    on_cpu, on_gpu = (costs_of_step(recipe, 8, device=torch.device(kind)) for kind in ("cpu", "cuda"))
    assert on_cpu.held != on_gpu.held
    assert on_gpu.uncounted == ()


def test_live_bytes() -> None:
    """What dies is taken off; gradients count apart until they are freed; views and known tensors do not count."""
    weight, x = torch.nn.Parameter(torch.zeros(100)), torch.zeros(100)
    with LiveBytes([weight], [x]) as live:
        view, y = x[:50], x + 1
        assert live.now == 400
        del y, view
        assert live.now == 0
        (weight * x).sum().backward()
        assert (live.now, live.gradients) == (0, 400)
        weight.grad = None
        assert (live.now, live.gradients) == (0, 0)


PEAK = """
import sys, torch
from pathlib import Path
from distill_core.parallel import lay_out
from distill_core.recipe.build import build_objective
from distill_core.recipe.resolve import load_recipe
from distill_core.registry import Registry
from distill_core import Progress
from distill_scale.step_costs import batch_of_examples
torch.set_num_threads(1)
recipe = load_recipe(sys.argv[1], registry=Registry.discover(), overrides=sys.argv[3:], allow_unset=True)
objective = build_objective(recipe)
def step(size):
    batch = batch_of_examples(recipe, size)
    objective.losses(objective.represent(batch, Progress(0, 1))).total.backward()
    for parameter in objective.parameters():
        parameter.grad = None
step(2)  # what is imported and made once
def memory(line):  # not getrusage, whose highest is that of the process before exec, too
    return next(int(x.split()[1]) * 1024 for x in Path("/proc/self/status").read_text().splitlines() if line in x)
before = memory("VmRSS")
step(int(sys.argv[2]))
print(memory("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_is_what_a_process_takes(registry: Registry) -> None:
    """The plan's peak, against the memory that the system gave a process for a real step of 500 MB."""
    overrides = ["train.precision=fp32", "backbone.image.layers=8", "backbone.image.width=256"]
    recipe = recipe_of(registry, "clip_tiny", *overrides)
    size = 96
    planned = costs_of_step(recipe, size, device=CPU)
    command = [sys.executable, "-c", PEAK, str(RECIPES / "clip_tiny.yaml"), str(size), *overrides]
    # large blocks straight from the system and back: the heap would keep holes between them
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True, env=environment)
    taken = int(done.stdout.split()[-1])
    assert planned.peak() > 2e8
    assert taken == pytest.approx(planned.peak() + planned.batch_bytes, rel=0.15)


def test_examples_are_tiled(tiny_recipe: Path, registry: Registry) -> None:
    """Sample 4 is sample 0 again, with its lengths."""
    recipe = load_recipe(tiny_recipe, registry=registry)
    batch = batch_of_examples(recipe, 6)
    assert len(batch) == 6
    for views in batch.views.values():
        for group in views.groups:
            assert torch.equal(group.x[:, 4:], group.x[:, :2])
            if group.lengths is not None:
                assert (group.lengths[:, 4:] == group.lengths[:, :2]).all()
    assert all(isinstance(x, Tensor) for x in tree_iter([g.x for v in batch.views.values() for g in v.groups]))
