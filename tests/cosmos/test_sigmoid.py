"""COSMOS with the sigmoid loss against loops over its view pairs; over ranks: recipes/test_distributed_methods.py."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distill_core.errors import RecipeErrors
from distill_core.outputs import Features, Fused, Outputs, Progress
from distill_core.plan import BackboneSpec, ModalityPlan, Plan, TeacherPlan
from distill_core.recipe.resolve import load_recipe
from distill_core.registry import Registry
from distill_cosmos.sigmoid import SigmoidContrastive, SigmoidDistillation
from distill_vl.contrastive import ContrastiveLoss

RECIPE = Path(__file__).parents[2] / "recipes/cosmos_sigmoid_tiny.yaml"
IMAGE_GLOBALS, IMAGES, TEXT_GLOBALS, TEXTS, BATCH, DIM = 2, 3, 1, 4, 3, 5


def plan() -> Plan:
    def modality(globals_: int, views: int) -> ModalityPlan:
        roles = ("global",) * globals_ + ("local",) * (views - globals_)
        return ModalityPlan(roles, BackboneSpec(8, DIM))

    teacher = TeacherPlan({"image": tuple(range(IMAGE_GLOBALS)), "text": tuple(range(TEXT_GLOBALS))})
    modalities = {"image": modality(IMAGE_GLOBALS, IMAGES), "text": modality(TEXT_GLOBALS, TEXTS)}
    return Plan(modalities, {"default": teacher}, fusion=True)


def unit(x: Tensor) -> Tensor:
    return x / x.square().sum(-1, keepdim=True).sqrt()


@pytest.fixture
def outputs() -> Outputs:
    torch.manual_seed(0)

    def random(views: int) -> Tensor:
        return torch.randn(views, BATCH, DIM, dtype=torch.float64, requires_grad=True)

    student = {"image": Features(random(IMAGES)), "text": Features(random(TEXTS))}
    teacher = {
        "image": Features(random(IMAGE_GLOBALS).detach()),
        "text": Features(random(TEXT_GLOBALS).detach()),
    }
    fused = {"image": Fused(unit(random(IMAGES))), "text": Fused(unit(random(TEXTS)))}
    return Outputs(student=student, teacher={"default": teacher}, fused=fused)


def pair(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """SigLIP's loss (section 3.2) for two views [B, D]."""
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(a)):
        for j in range(len(b)):
            logit = scale * (a[i] @ b[j]) + bias
            total = total + torch.log(1 + torch.exp(-logit if i == j else logit))
    return total / len(a)


def mean(values: list[Tensor]) -> Tensor:
    return torch.stack(values).mean()


def check(loss: Any, term: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(term, expected, rtol=1e-10, atol=1e-10)
    inputs = [*inputs, loss.logit_scale, loss.logit_bias]
    for got, true in zip(torch.autograd.grad(term, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(got, true, rtol=1e-10, atol=1e-10)


def test_contrastive(outputs: Outputs) -> None:
    """Catches local crops that enter, texts that stay out, and InfoNCE in the sigmoid's place."""
    loss = SigmoidContrastive(SigmoidContrastive.Config(temperature=0.3, bias=-2.0), plan()).double()
    image, text = (outputs.student[m].pooled for m in ("image", "text"))
    scale = loss.logit_scale.exp()
    pairs = [pair(unit(u), unit(v), scale, loss.logit_bias) for u in image[:IMAGE_GLOBALS] for v in text]
    assert len(pairs) == IMAGE_GLOBALS * TEXTS
    terms, metrics = loss(outputs)
    check(loss, terms["contrastive"], mean(pairs), [image, text])
    assert metrics["bias"].item() == -2.0
    assert metrics["scale"].item() == pytest.approx(1 / 0.3)


def test_distillation(outputs: Outputs) -> None:
    """Catches one mean over all pairs in place of the mean of four blocks, whose sizes differ."""
    loss = SigmoidDistillation(SigmoidDistillation.Config(temperature=0.3, bias=-2.0), plan()).double()
    assert outputs.fused
    scale, blocks = loss.logit_scale.exp(), []
    for fused in ("image", "text"):
        for teacher in ("image", "text"):
            views = [
                (u, unit(v)) for u in outputs.fused[fused].pooled for v in outputs.teacher["default"][teacher].pooled
            ]
            blocks.append(mean([pair(u, v, scale, loss.logit_bias) for u, v in views]))
    terms, metrics = loss(outputs)
    check(loss, terms["cross_modal_distillation"], mean(blocks), [f.pooled for f in outputs.fused.values()])
    assert metrics["text_to_image"].item() == pytest.approx(blocks[2].item(), rel=1e-10)
    config = SigmoidDistillation.Config(temperature=0.3, bias=-2.0, pairs=("text_to_image",))
    chosen, _ = SigmoidDistillation(config, plan()).double()(outputs)
    assert chosen["cross_modal_distillation"].item() == pytest.approx(blocks[2].item(), rel=1e-10)


@pytest.mark.parametrize("cls", [SigmoidContrastive, SigmoidDistillation])
def test_it_starts_as_siglip_and_is_clamped_as_cosmos(cls: type[ContrastiveLoss], outputs: Outputs) -> None:
    loss = cls(cls.Config(), plan())
    assert loss.logit_scale.item() == pytest.approx(math.log(10))
    assert loss.get_parameter("logit_bias").item() == -10
    loss.logit_scale.data.fill_(7.0)
    loss.after_step(outputs, Progress(0, 1))
    assert loss.logit_scale.item() == pytest.approx(math.log(100))
    assert loss.get_parameter("logit_bias").item() == -10


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("teacher=null", "'sigmoid_distillation' needs a teacher; this recipe has none"),
        ("fusion=null", "'sigmoid_distillation' needs fused views; this recipe has no fusion"),
        ("loss.1.pairs=[image_to_txt]", "'sigmoid_distillation' has no pair 'image_to_txt', did you mean"),
        ("loss.1.targets=soft", "unknown option 'targets'"),
    ],
)
def test_what_cannot_work_is_refused(registry: Registry, override: str, message: str) -> None:
    with pytest.raises(RecipeErrors) as caught:
        load_recipe(RECIPE, registry=registry, overrides=[override])
    assert [message in line for line in caught.value.lines] == [True]


def test_the_recipe_resolves(registry: Registry) -> None:
    recipe = load_recipe(RECIPE, registry=registry)
    assert [node.cls for node in recipe.loss] == [SigmoidContrastive, SigmoidDistillation]
