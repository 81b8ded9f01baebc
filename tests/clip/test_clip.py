"""CLIP's loss against its equation; its ranks are in tests/recipes/test_distributed_methods.py."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from distill_clip.components import Clip
from distill_core.errors import RecipeErrors
from distill_core.outputs import Features, Outputs, Progress
from distill_core.plan import BackboneSpec, ModalityPlan, Plan
from distill_core.recipe.resolve import parse_recipe
from distill_core.registry import Registry

RECIPE = """\
augment: {image: {name: random_crop, size: 8}, text: caption}
backbone:
  image: {name: vit, image_size: 8, patch: 4, width: 8, layers: 1, heads: 2, dim: 6}
  text: {name: clip_text, width: 8, layers: 1, heads: 2, dim: 4}
loss: [clip]
data: {source: {name: webdataset, urls: x.tar}}
train: {steps: 1}
"""


def loss(**options: Any) -> Clip:
    modality = ModalityPlan(("global", "local"), BackboneSpec(8, 6))
    return Clip(Clip.Config(**options), Plan({"image": modality, "text": modality})).double()


def outputs(image: Tensor, text: Tensor) -> Outputs:
    return Outputs(student={"image": Features(image), "text": Features(text)})


def equation(image: Tensor, text: Tensor, log_scale: Tensor) -> Tensor:
    """1/2N sum_i [-log e^(s x_i.y_i) / sum_j e^(s x_i.y_j) - log e^(s x_i.y_i) / sum_j e^(s x_j.y_i)] of unit x, y."""
    x, y = (rows / rows.square().sum(1, keepdim=True).sqrt() for rows in (image, text))
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(x)):
        right = torch.exp(log_scale.exp() * x[i] @ y[i])
        of_texts = sum(torch.exp(log_scale.exp() * x[i] @ y[j]) for j in range(len(y)))
        of_images = sum(torch.exp(log_scale.exp() * x[j] @ y[i]) for j in range(len(x)))
        total = total - torch.log(right / of_texts) - torch.log(right / of_images)
    return total / (2 * len(x))


def test_loss_and_gradients_are_the_equations() -> None:
    """Catches one direction alone, embeddings of other lengths than 1, a scale without a gradient, and later views."""
    torch.manual_seed(0)
    made = loss(temperature=0.25)
    image, text = (torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    terms, metrics = made(outputs(image, text))
    expected = equation(image[0], text[0], made.logit_scale)
    assert list(terms) == ["clip"]
    torch.testing.assert_close(terms["clip"], expected, rtol=1e-10, atol=1e-10)
    assert metrics["scale"].item() == pytest.approx(4.0)
    inputs = [image, text, made.logit_scale]
    got, true = (torch.autograd.grad(value, inputs) for value in (terms["clip"], expected))
    for g, t in zip(got, true, strict=True):
        torch.testing.assert_close(g, t, rtol=1e-10, atol=1e-10)
    assert (got[0][1] == 0).all()


def test_the_scale_starts_and_stays_where_the_paper_says() -> None:
    """1 / 0.07 to start from, and never above 100 (section 2.5)."""
    made = loss()
    assert made.logit_scale.exp().item() == pytest.approx(1 / 0.07)
    for before, after in ((math.log(500), 100.0), (-1.0, 1.0), (math.log(30), 30.0)):
        with torch.no_grad():
            made.logit_scale.fill_(before)
        made.after_step(outputs(torch.ones(1, 1, 6), torch.ones(1, 1, 6)), Progress(0, 1))
        assert made.logit_scale.exp().item() == pytest.approx(after)


def test_embeddings_of_two_widths_are_refused(registry: Registry) -> None:
    """Before any data is read."""
    with pytest.raises(RecipeErrors, match="'clip' compares embeddings of one width D"):
        parse_recipe(RECIPE, "r.yaml", registry=registry)
    parse_recipe(RECIPE.replace("dim: 4", "dim: 6"), "r.yaml", registry=registry)
