"""TIPSv2: the patch loss of all patches, and a teacher of which the heads alone are averages, against plain torch."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, normalize

from distill_core.batch import Batch, Group, Views
from distill_core.objective import Objective
from distill_core.outputs import Progress
from distill_core.recipe.build import build_objective
from distill_core.recipe.resolve import load_recipe, parse_recipe
from distill_core.registry import Registry

RECIPE = """
augment: {image: {name: multi_crop, size: 12, local_size: 4, global: 1, local: 2, masked: 1}}
backbone:
  image:
    {name: vit, image_size: 12, patch: 4, width: 8, layers: 2, heads: 2, dim: 6, masking: MASKING}
loss:
  - {name: dino, HEAD}
  - {name: ibot, HEAD, CENTRING, patches: all, role: masked, target_role: global, shared_head: false}
teacher: {momentum: 0.9, of: [loss.dino.head, loss.ibot.head]}
data: {source: {name: webdataset, urls: none.tar}}
train: {steps: 10}
"""
HEAD = "prototypes: 7, hidden: 6, bottleneck: 5, teacher_temperature: 0.05"
PROGRESS = Progress(2, 10)
B = 5


def objective(registry: Registry, centring: str = "ema", ratio: str = "[0.75, 0.75]") -> Objective:
    """Heads, teacher and centres away from the start, where student and teacher are one."""
    torch.manual_seed(0)
    text = RECIPE.replace("HEAD", HEAD).replace("CENTRING", f"centring: {centring}")
    text = text.replace("MASKING", f"{{roles: [masked], ratio: {ratio}}}")
    made = build_objective(parse_recipe(text, "r.yaml", registry=registry)).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
        for name, buffer in made.named_buffers():
            if name.endswith("center"):
                buffer.normal_(std=0.1)
    return made


def batch() -> Batch:
    """The masks hide different numbers of patches: none of the first picture, all of the last."""
    generator = torch.Generator().manual_seed(1)
    whole = torch.randn(1, B, 3, 12, 12, generator=generator, dtype=torch.float64)
    local = torch.randn(2, B, 3, 4, 4, generator=generator, dtype=torch.float64)
    mask = torch.arange(9) < torch.tensor([0, 2, 5, 7, 9])[:, None]
    groups = [Group(whole, "global"), Group(local, "local"), Group(whole, "masked", token_mask=mask[None])]
    return Batch({"image": Views(groups)}, [f"k{i}" for i in range(B)])


def head(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """A DINO head of three linear layers: h of the paper, before its softmax."""
    for i, layer in enumerate((0, 2, 4)):
        x = x @ state[f"mlp.{layer}.weight"].T + state[f"mlp.{layer}.bias"]
        x = gelu(x) if i < 2 else x
    return normalize(x, dim=-1) @ normalize(state["last_layer"], dim=-1).T


def ibot_plus_plus(teacher: Tensor, student: Tensor) -> Tensor:
    """-sum_i h_t(f_t(I)_i)^T log h_s(f_s(I_mask)_i), with no m_i, over N, of each picture: [B, N, K] each -> [B, N]."""
    losses = []
    for target, said in zip(teacher, student, strict=True):  # a picture at a time: no mask is read anywhere
        losses.append(torch.stack([-(target[i] @ said[i].log()) for i in range(len(target))]))
    return torch.stack(losses)


def sinkhorn(logits: Tensor) -> Tensor:
    """Rows [N, K] shared alike among K prototypes, three times (SwAV)."""
    q = logits.exp()
    for _ in range(3):
        q = q / q.sum(0, keepdim=True)
        q = q / q.sum(1, keepdim=True)
    return q


@pytest.mark.parametrize("centring", ["ema", "sinkhorn_knopp"])
def test_every_patch_learns(registry: Registry, centring: str) -> None:
    """Catches visible patches that are left out, another weight for pictures with few hidden ones, a teacher that sees
    the mask, a teacher's tower of its own, and the student's head for the teacher."""
    made, views = objective(registry, centring), batch()
    losses = made.losses(made.represent(views, PROGRESS))
    tower, (whole, _, masked) = made.backbone["image"], views.views["image"].groups
    seen = tower(Views([Group(whole.x, "global")]), tokens_of=[0]).tokens[0]
    hidden = tower(Views([masked]), tokens_of=[0], masked=True).tokens[0]
    teacher = head(made.get_submodule("teacher.default.loss.ibot.head").state_dict(), seen)
    student = head(made.loss["ibot"].head.state_dict(), hidden)
    if centring == "ema":
        targets = ((teacher - made.loss["ibot"].targets.center) / 0.05).softmax(-1)
    else:
        targets = sinkhorn(teacher.flatten(0, 1) / 0.05).view_as(teacher)
    each = ibot_plus_plus(targets, (student / 0.1).softmax(-1))
    torch.testing.assert_close(losses.terms["ibot"], each.mean(), rtol=1e-10, atol=1e-10)
    assert abs(each[masked.token_mask[0]].mean() - each.mean()) > 1e-3, "hidden patches alone would be another number"
    visible = each[~masked.token_mask[0]].mean()
    torch.testing.assert_close(losses.metrics["ibot/visible_cross_entropy"], visible.detach(), rtol=1e-10, atol=1e-10)


def test_the_centre_is_that_of_all_patches(registry: Registry) -> None:
    made, views = objective(registry), batch()
    center = made.loss["ibot"].targets.center.clone()
    seen = made.backbone["image"](Views([views.views["image"].groups[0]]), tokens_of=[0]).tokens[0]
    logits = head(made.get_submodule("teacher.default.loss.ibot.head").state_dict(), seen)
    outputs = made.represent(views, PROGRESS)
    made.losses(outputs)
    made.after_step(outputs, PROGRESS)
    expected = 0.9 * center + 0.1 * logits.mean((0, 1))
    torch.testing.assert_close(made.loss["ibot"].targets.center, expected, rtol=1e-10, atol=1e-10)


def test_without_masks_every_patch_learns(registry: Registry) -> None:
    """`ratio: [0, 0]`, as where the paper distils a larger model: nothing is hidden, and all of it is a loss."""
    made, views = objective(registry, ratio="[0, 0]"), batch()
    views.views["image"].groups[2].token_mask[:] = False
    losses = made.losses(made.represent(views, PROGRESS))
    assert losses.terms["ibot"].item() > 0.1
    assert losses.metrics["ibot/visible_cross_entropy"].item() == pytest.approx(losses.terms["ibot"].item())


def test_heads_alone_are_averaged(registry: Registry) -> None:
    """h_t <- m h_t + (1 - m) h_s and f_t = f_s: catches a tower that is copied, one that the teacher trains, and a head
    that stands still."""
    made = objective(registry)
    named = {name for name, _ in made.named_parameters() if name.startswith("teacher.")}
    assert {re.sub(r"\.head\..*", ".head", name) for name in named} == {
        "teacher.default.loss.dino.head",
        "teacher.default.loss.ibot.head",
    }
    outputs = made.represent(batch(), PROGRESS)
    seen = outputs.teacher["default"]["image"]
    assert not seen.tokens[0].requires_grad
    assert not seen.class_tokens.requires_grad
    tower: nn.Module = made.backbone["image"]
    before = {name: p.clone() for name, p in made.named_parameters()}
    made.losses(outputs).total.backward()
    assert all(p.grad is None for name, p in made.named_parameters() if name in named)
    with torch.no_grad():
        for p in made.parameters():
            if p.grad is not None:
                p -= 0.1 * p.grad
    made.after_step(outputs, PROGRESS)
    now = dict(made.named_parameters())
    for name in named:
        student = now[name.removeprefix("teacher.default.")]
        torch.testing.assert_close(now[name], 0.9 * before[name] + 0.1 * student, rtol=1e-10, atol=1e-10)
    again = made.represent(batch(), PROGRESS).teacher["default"]["image"].tokens[0]
    moved = tower(Views([batch().views["image"].groups[0]]), tokens_of=[0]).tokens[0]
    torch.testing.assert_close(again, moved.detach(), rtol=1e-10, atol=1e-10)
    assert (again - seen.tokens[0]).abs().max() > 1e-4, "the teacher's tower is the student's of this step"


def test_the_recipe_is_the_method(registry: Registry) -> None:
    """Weights 1, 1 and 2; 75 % of the patches hidden; a teacher without towers."""
    recipe = load_recipe(Path(__file__).parents[2] / "recipes/tips2_tiny.yaml", registry=registry)
    weights = {loss.cls.name: loss.config.weight.value(PROGRESS) for loss in recipe.loss}
    assert weights == {"two_token_contrastive": 1.0, "dino": 1.0, "ibot": 2.0}
    assert recipe.backbone["image"].config.masking.ratio == (0.75, 0.75)
    assert not recipe.plan.teachers["default"].copies("backbone.image")
