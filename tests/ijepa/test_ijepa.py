"""I-JEPA: masks by their properties; the predictor and the loss against a transcription that goes block by block."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm, scaled_dot_product_attention

from distill_core import (
    PREDICTED,
    BackboneSpec,
    Features,
    Group,
    MaskPlan,
    ModalityPlan,
    Outputs,
    Plan,
    Progress,
    TeacherPlan,
    Views,
)
from distill_core.recipe.build import build_objective
from distill_core.recipe.resolve import load_recipe
from distill_core.registry import Registry
from distill_core.tools import example_batch
from distill_ijepa.loss import IJepa, IJepaConfig
from distill_ijepa.masks import MultiBlock, MultiBlockConfig

GRID, PATCH = (5, 4), 2


def plan(teacher_width: int = 12, views: int = 1) -> Plan:
    spec = BackboneSpec(8, 6, can_drop=True, stride=(PATCH, PATCH))
    image = ModalityPlan(
        ("global",) * views + ("local",), spec, extras=(PREDICTED,), mask=MaskPlan("global", 1, True, False)
    )
    teacher = TeacherPlan({"image": tuple(range(views))}, {"image": BackboneSpec(teacher_width, 6)})
    return Plan({"image": image}, {"default": teacher})


def masker(**options: Any) -> MultiBlock:
    return MultiBlock(MultiBlockConfig(**options), "image", plan())


def test_masks_are_blocks_and_a_context_without_them() -> None:
    """Of the sizes that the paper names. Catches rows taken for columns, blocks that are cut off, a context that holds
    a target, and one of another number of patches; and sizes that are always the same."""
    rows, columns = 14, 16
    tokens, made, areas, aspects = rows * columns, masker(), [], []
    for seed in range(200):
        mask = made.draw((rows, columns), np.random.default_rng(seed))
        predicted = mask.extra[PREDICTED]
        assert predicted.shape == (4, int(0.2 * tokens))
        assert mask.keep is not None
        assert len(set(mask.keep.tolist())) == round(0.25 * tokens)
        for row in predicted:
            places = row[row >= 0]
            assert (row[len(places) :] == -1).all()
            ys, xs = places // columns, places % columns
            height, width = ys.max() - ys.min() + 1, xs.max() - xs.min() + 1
            assert len(set(places.tolist())) == height * width, "a whole rectangle"
            areas.append(height * width / tokens)
            aspects.append(height / width)
            assert not set(places.tolist()) & set(mask.keep.tolist())
    assert 0.13 < min(areas) < 0.155
    assert 0.18 < max(areas) <= 0.2
    assert 0.65 < min(aspects) < 0.8
    assert 1.4 < max(aspects) < 1.7
    assert len({round(area, 3) for area in areas}) > 4
    corners = {int(made.draw((rows, columns), np.random.default_rng(s)).extra[PREDICTED][0, 0]) for s in range(300)}
    assert len(corners) > 60, "blocks stand anywhere"


def test_a_context_that_is_too_small_is_drawn_again() -> None:
    """With a `keep` that four blocks leave but seldom: at last they stand at one place. What even one does not leave is
    refused with the recipe."""
    made = masker(keep=0.8)
    for seed in range(50):
        mask = made.draw((6, 6), np.random.default_rng(seed))
        assert mask.keep is not None
        assert len(mask.keep) == 29
        assert not set(mask.extra[PREDICTED].flatten().tolist()) & set(mask.keep.tolist())
    (problem,) = MultiBlock.grid_problems(MultiBlockConfig(keep=0.9), (6, 6))
    assert "keep: 32 of 36 patches are not left beside a block of 7" in problem
    assert not list(MultiBlock.grid_problems(MultiBlockConfig(), (6, 6)))
    (problem,) = MultiBlock.grid_problems(MultiBlockConfig(), (36,))
    assert "a grid of 1 axes" in problem


def loss_of(**options: Any) -> tuple[IJepa, Outputs]:
    """In double precision: two views, one of them without the mask's role; blocks of several sizes."""
    torch.manual_seed(0)
    loss = IJepa(IJepaConfig(width=8, layers=2, heads=2, **options), plan()).double()
    for parameter in loss.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    samples, kept = 3, 6
    order = torch.stack([torch.randperm(20) for _ in range(samples)])
    keep = order[:, :kept].sort(-1).values[None]
    predicted = order[:, kept:16].unflatten(1, (2, 5))[None].clone()
    predicted[0, :, 1, 3:] = -1
    predicted[0, 1, 0, 4:] = -1
    x = torch.zeros(1, samples, 3, GRID[0] * PATCH, GRID[1] * PATCH)
    group = Group(x, keep=keep, extra={PREDICTED: predicted})
    student = Features(torch.zeros(2, samples, 6), {0: torch.randn(samples, kept, 8).double().requires_grad_()})
    teacher = Features(torch.zeros(1, samples, 6), {0: 3 * torch.randn(samples, 20, 12).double()})
    views = Views([group, Group(torch.zeros(1, samples, 3, 4, 4), "local")])
    return loss, Outputs({"image": views}, {"image": student}, {"default": {"image": teacher}})


def position(row: int, column: int, width: int) -> list[float]:
    """As MAE's `get_2d_sincos_pos_embed` has it: first the column's, then the row's."""
    values = []
    for place in (column, row):
        for function in (math.sin, math.cos):
            values += [function(place / 10_000 ** (i / (width / 4))) for i in range(width // 4)]
    return values


def by_hand(loss: IJepa, context: Tensor, keep: list[int], places: list[int]) -> Tensor:
    """One block of one sample: its mask tokens beside the context, through the blocks by torch's functions."""
    p = loss.predictor
    table = torch.tensor([position(i // GRID[1], i % GRID[1], 8) for i in range(20)], dtype=torch.float64)
    x = torch.cat([p.embed(context) + table[keep], p.mask_token + table[places]])
    for block in p.transformer.resblocks:
        y: Any = block.ln_1(x)
        qkv = y @ block.attn.in_proj_weight.T + block.attn.in_proj_bias
        q, k, v = (part.unflatten(1, (2, -1)).transpose(0, 1) for part in qkv.chunk(3, 1))
        x = x + block.attn.out_proj(scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1))
        x = x + block.mlp(block.ln_2(x))
    return p.project(p.norm(x[len(keep) :]))  # type: ignore[no-any-return]


@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_the_loss_against_a_transcription(beta: float) -> None:
    """With gradients. Catches a block that sees another, or the padding; positions of other patches; targets that are
    not normalised, or of the student; and a mean in which large blocks count for more."""
    loss, outputs = loss_of(beta=beta)
    (terms, metrics) = loss(outputs)
    tokens = outputs.student["image"].tokens[0]
    inputs = [tokens, *loss.parameters()]
    found = torch.autograd.grad(terms["ijepa"], inputs)
    group = outputs.views["image"].groups[0]
    targets = layer_norm(outputs.teacher["default"]["image"].tokens[0], (12,))
    total = torch.zeros((), dtype=torch.float64)
    for b in range(3):
        assert group.keep is not None
        keep = group.keep[0, b].tolist()
        for block in group.extra[PREDICTED][0, b].tolist():
            places = [place for place in block if place >= 0]
            difference = (by_hand(loss, tokens[b], keep, places) - targets[b, places]).abs()
            each = torch.where(difference < beta, 0.5 * difference**2 / beta, difference - 0.5 * beta)
            total = total + each.mean() / 6
    torch.testing.assert_close(terms["ijepa"], total, rtol=1e-9, atol=1e-12)
    for one, other in zip(found, torch.autograd.grad(total, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(metrics["target_deviation"], targets.flatten(0, 1).std(0, correction=0).mean())


def test_the_recipe_predicts_the_average_from_a_quarter(registry: Registry) -> None:
    """Catches a student that sees more than the context, a teacher that is masked, and what trains besides tower and
    predictor."""
    recipe = load_recipe(Path(__file__).parents[2] / "recipes/ijepa_tiny.yaml", registry=registry)
    torch.manual_seed(0)
    objective = build_objective(recipe)
    outputs = objective.represent(example_batch(recipe, 4), Progress(0, 10))
    assert outputs.student["image"].tokens[0].shape == (4, 9, 128)
    assert outputs.teacher["default"]["image"].tokens[0].shape == (4, 36, 128)
    objective.losses(outputs).total.backward()
    untouched = {n for n, p in objective.named_parameters() if p.grad is None and not n.startswith("teacher.")}
    assert untouched == {"backbone.image.proj"}
    assert recipe.untrained_embeddings() == {"image"}
