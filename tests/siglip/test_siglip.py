"""SigLIP's loss against its equation; the ring over ranks is in tests/recipes/test_distributed_methods.py."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distill_core.errors import RecipeErrors
from distill_core.outputs import Features, Outputs, Progress
from distill_core.plan import BackboneSpec, ModalityPlan, Plan
from distill_core.recipe.resolve import load_recipe, parse_recipe
from distill_core.registry import Registry
from distill_siglip.loss import SigLip
from distill_vl.ring import ring_sigmoid

ROOT = Path(__file__).parents[2]
RECIPE = """\
augment: {image: {name: random_crop, size: 8}, text: caption}
backbone:
  image: {name: vit, image_size: 8, patch: 4, width: 8, layers: 1, heads: 2, dim: 6}
  text: {name: clip_text, width: 8, layers: 1, heads: 2, dim: 6}
loss: [siglip]
data: {source: {name: webdataset, urls: x.tar}}
train: {steps: 1}
"""


def loss(**options: Any) -> SigLip:
    modality = ModalityPlan(("global", "local"), BackboneSpec(8, 6))
    return SigLip(SigLip.Config(**options), Plan({"image": modality, "text": modality})).double()


def outputs(image: Tensor, text: Tensor) -> Outputs:
    return Outputs(student={"image": Features(image), "text": Features(text)})


def equation(x: Tensor, y: Tensor, t_prime: Tensor, b: Tensor) -> Tensor:
    """-1/|B| sum_i sum_j log 1 / (1 + exp(z_ij (-t x_i . y_j - b))), z = 1 on the diagonal and -1 elsewhere."""
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(x)):
        for j in range(len(y)):
            z = 1.0 if i == j else -1.0
            dot = (x[i] / x[i].square().sum().sqrt()) @ (y[j] / y[j].square().sum().sqrt())
            total = total + torch.log(1 / (1 + torch.exp(z * (-t_prime.exp() * dot - b))))
    return -total / len(x)


@pytest.mark.parametrize("exchange", ["gather", "ring"])
def test_loss_and_gradients_are_the_equations(exchange: str) -> None:
    """Catches a softmax, a missing bias, a mean over columns, a sign, and views after the first."""
    torch.manual_seed(0)
    made = loss(exchange=exchange, temperature=0.4, bias=-1.5)
    image, text = (torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    terms, metrics = made(outputs(image, text))
    expected = equation(image[0], text[0], made.logit_scale, made.logit_bias)
    torch.testing.assert_close(terms["siglip"], expected, rtol=1e-10, atol=1e-10)
    assert list(terms) == ["siglip"]
    assert metrics["scale"].item() == pytest.approx(2.5)
    assert metrics["bias"].item() == -1.5
    inputs = [image, text, made.logit_scale, made.logit_bias]
    got, true = (torch.autograd.grad(value, inputs) for value in (terms["siglip"], expected))
    for g, t in zip(got, true, strict=True):
        torch.testing.assert_close(g, t, rtol=1e-10, atol=1e-10)


def test_the_ring_of_one_rank_is_the_whole_loss_of_all_view_pairs() -> None:
    a, b = torch.randn(2, 4, 3, dtype=torch.float64), torch.randn(3, 4, 3, dtype=torch.float64)
    a, b = (torch.nn.functional.normalize(x, dim=-1) for x in (a, b))
    scale, bias = torch.tensor(3.0, dtype=torch.float64), torch.tensor(-0.5, dtype=torch.float64)
    expected = torch.stack([torch.stack([equation(x, y, scale.log(), bias) for y in b]) for x in a])
    torch.testing.assert_close(ring_sigmoid(a, b, scale, bias), expected, rtol=1e-10, atol=1e-10)


def test_it_starts_and_stays_where_the_paper_says() -> None:
    """Catches CLIP's temperature and clamp, which SigLIP does not have."""
    made, limited = loss(), loss(max_scale=50.0)
    assert made.logit_scale.item() == pytest.approx(math.log(10))
    assert made.logit_bias.item() == -10
    nothing = outputs(torch.zeros(1, 1, 6), torch.zeros(1, 1, 6))
    for one, expected in ((made, 7.0), (limited, math.log(50))):
        one.logit_scale.data.fill_(7.0)
        one.after_step(nothing, Progress(0, 1))
        assert one.logit_scale.item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("loss.0.modalities=[image, txt]", "'siglip' needs a modality 'txt', did you mean 'text'?"),
        ("backbone.text.dim=4", "'siglip' compares embeddings of one width D; the backbones give image 6, text 4"),
        ("loss.0.exchange=tree", "must be 'gather' or 'ring', got 'tree'"),
    ],
)
def test_what_cannot_work_is_refused(registry: Registry, override: str, message: str) -> None:
    overrides = ["loss=[{name: siglip}]", override]
    with pytest.raises(RecipeErrors) as caught:
        parse_recipe(RECIPE, "r.yaml", registry=registry, overrides=overrides)
    (line,) = caught.value.lines
    assert message in line


def test_the_recipe_resolves(registry: Registry) -> None:
    recipe = load_recipe(ROOT / "recipes/siglip_tiny.yaml", registry=registry)
    assert [node.cls for node in recipe.loss] == [SigLip]
    assert recipe.loss[0].config.exchange == "gather"
