"""SLIP: its views, SimCLR's loss and head against loops; over ranks in tests/recipes/test_distributed_methods.py."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from distill_clip.components import Clip
from distill_core.errors import RecipeErrors
from distill_core.outputs import Features, Outputs
from distill_core.plan import BackboneSpec, ModalityPlan, Plan
from distill_core.recipe.resolve import load_recipe
from distill_core.registry import Registry
from distill_slip.simclr import SimClr
from distill_slip.views import SlipViews
from distill_vl.clip_text import ClipText

RECIPE = Path(__file__).parents[2] / "recipes/slip_tiny.yaml"
WIDTH, DIM = 7, 5


def loss(**options: Any) -> SimClr:
    roles = ("global", "simclr", "simclr", "simclr")
    plan = Plan({"image": ModalityPlan(roles, BackboneSpec(WIDTH, DIM))})
    torch.manual_seed(1)
    made = SimClr(SimClr.Config(hidden=6, dim=4, **options), plan).double()
    for parameter in made.parameters():  # away from weights of 1 and biases of 0
        parameter.data += 0.3 * torch.randn_like(parameter)
    return made


def outputs(batch: int, class_tokens: bool = True) -> Outputs:
    torch.manual_seed(2)

    def random(*shape: int) -> Tensor:
        x = torch.randn(4, batch, *shape, dtype=torch.float64)
        x[2, 0] = x[1, 0] + 0.1  # the two views of the first sample are alike
        return x.requires_grad_()

    pooled = random(DIM)
    classes = random(2, WIDTH) if class_tokens else None
    return Outputs(student={"image": Features(pooled, class_tokens=classes)})


def linear(made: SimClr, name: str, x: Tensor) -> Tensor:
    weight, bias = (made.get_parameter(f"head.{name}.{part}") for part in ("weight", "bias"))
    return torch.stack([torch.stack([row @ w + b for w, b in zip(weight, bias, strict=True)]) for row in x])


def norm(made: SimClr, name: str, x: Tensor) -> Tensor:
    """Batch norm (arXiv 1502.03167, algorithm 1), column by column."""
    weight, bias = (made.get_parameter(f"head.{name}.{part}") for part in ("weight", "bias"))
    columns = []
    for j in range(x.shape[1]):
        column = x[:, j]
        mean = column.sum() / len(column)
        variance = ((column - mean) ** 2).sum() / len(column)
        columns.append(weight[j] * (column - mean) / torch.sqrt(variance + 1e-5) + bias[j])
    return torch.stack(columns, 1)


def head(made: SimClr, x: Tensor) -> Tensor:
    for i in (1, 2):
        x = norm(made, f"bn{i}", linear(made, f"layer{i}", x)).clamp(min=0)
    return linear(made, "layer3", x)


def accuracy(first: Tensor, second: Tensor) -> float:
    """The share of the 2N embeddings whose nearest other, by cosine, is the other view of their sample."""
    z = torch.nn.functional.normalize(torch.cat([first, second]), dim=-1)
    n = len(first)
    right = 0
    for i in range(2 * n):
        cosines = {j: (z[i] @ z[j]).item() for j in range(2 * n) if j != i}
        right += max(cosines, key=cosines.__getitem__) == (i + n) % (2 * n)
    return right / (2 * n)


def nt_xent(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """SimCLR's algorithm 1: over 2N embeddings, l(i, j) = -log exp(s_ij / t) / sum over k != i of exp(s_ik / t)."""
    z = [*first, *second]
    n = len(first)

    def similarity(i: int, j: int) -> Tensor:
        return (z[i] @ z[j]) / (z[i].square().sum().sqrt() * z[j].square().sum().sqrt())

    total = torch.zeros((), dtype=torch.float64)
    for i in range(2 * n):
        others = torch.stack([torch.exp(similarity(i, k) / temperature) for k in range(2 * n) if k != i])
        total = total - torch.log(torch.exp(similarity(i, (i + n) % (2 * n)) / temperature) / others.sum())
    return total / (2 * n)


@pytest.mark.parametrize("source", ["class_tokens", "pooled"])
def test_loss_and_gradients_are_the_equations(source: str) -> None:
    """Catches embeddings compared with themselves, batch statistics over both views, a third view, a wrong token."""
    made, given = loss(source=source, temperature=0.2), outputs(4)
    features = given.student["image"]
    assert features.class_tokens is not None
    read = features.class_tokens[:, :, 0] if source == "class_tokens" else features.pooled
    pair = head(made, read[1]), head(made, read[2])
    expected = nt_xent(*pair, 0.2)
    terms, metrics = made(given)
    torch.testing.assert_close(terms["simclr"], expected, rtol=1e-10, atol=1e-10)
    assert metrics["accuracy"].item() == accuracy(*pair)
    assert 0 < metrics["accuracy"] < 1, "the draw tells right from wrong"
    inputs = [features.class_tokens if source == "class_tokens" else features.pooled, *made.parameters()]
    got, true = (torch.autograd.grad(value, inputs) for value in (terms["simclr"], expected))
    for g, t in zip(got, true, strict=True):
        torch.testing.assert_close(g, t, rtol=1e-10, atol=1e-10)


def test_a_sample_alone_has_no_negative() -> None:
    """Catches a denominator that holds the embedding itself: the loss would be log(1 + ...), not 0."""
    terms, metrics = loss()(outputs(1))
    assert terms["simclr"].item() == 0
    assert metrics["accuracy"].item() == 1


def test_half_precision_keeps_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches logits that autocast lowers: the head's layers alone may be rounded, and are the same in both here."""
    made, given = loss().float(), outputs(4)
    given.student["image"].class_tokens = given.student["image"].class_tokens.float()  # type: ignore[union-attr]
    with torch.autocast("cpu", torch.bfloat16):
        embedding = made.head(given.student["image"].class_tokens[1:3, :, 0])  # type: ignore[index]
        assert embedding.dtype == torch.bfloat16
        monkeypatch.setattr(made.head, "forward", lambda *_: embedding)
        lowered = made(given)[0]["simclr"]
    assert lowered.dtype == torch.float32
    torch.testing.assert_close(lowered, made(given)[0]["simclr"], rtol=1e-5, atol=0)


def test_half_precision_keeps_the_batch_statistics() -> None:
    """Catches a mean or a variance of bf16 numbers."""
    made = loss().float()
    x = (3 + torch.randn(2, 40, 6)).to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        found = made.head.bn1(x)
    expected = torch.stack([norm(made, "bn1", view) for view in x.float()])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_backbone_without_class_tokens_is_named(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, not at the first step."""
    monkeypatch.setattr(ClipText, "spec", lambda config: BackboneSpec(config.width, config.dim))
    given = ["augment.text={name: sub_captions, count: 2}", "loss.1.modality=text", "loss.1.role=global"]
    with pytest.raises(RecipeErrors) as caught:
        load_recipe(RECIPE, registry=registry, overrides=given)
    (line,) = caught.value.lines
    assert "'simclr' reads the class tokens of 'text', whose backbone gives none; set its option source: pooled" in line
    load_recipe(RECIPE, registry=registry, overrides=[*given, "loss.1.source=pooled"])
    loss(source="pooled")(outputs(2, class_tokens=False))


def sample() -> dict[str, Any]:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((120, 80), Image.Resampling.BICUBIC).save(file, "PNG")
    return {"__key__": "k", "png": file.getvalue()}


def test_views() -> None:
    """Catches views in another order or number than `roles` says, strong views that are one crop, and lost seeds."""
    augment = SlipViews(SlipViews.Config(size=16))
    views = augment.train_views(sample(), np.random.default_rng(3))
    assert tuple(view.role for view in views) == SlipViews.roles(augment.config) == ("global", "simclr", "simclr")
    assert all(view.data.shape == (3, 16, 16) for view in views)
    assert not torch.equal(views[1].data, views[2].data)
    again = augment.train_views(sample(), np.random.default_rng(3))
    assert all(torch.equal(a.data, b.data) for a, b in zip(views, again, strict=True))


@pytest.mark.parametrize("option", ["jitter_p", "grey", "blur", "flip"])
def test_each_recolouring_is_of_the_strong_views_only(option: str) -> None:
    """Catches an option that does nothing, and CLIP's view recoloured."""
    off: dict[str, Any] = {
        "size": 16,
        "jitter_p": 0.0,
        "grey": 0.0,
        "blur": 0.0,
        "flip": 0.0,
        "blur_radius": (1.0, 2.0),
    }
    off |= {"clip_scale": (1.0, 1.0), "scale": (1.0, 1.0)}
    plain, changed = (
        SlipViews(SlipViews.Config(**options)).train_views(sample(), np.random.default_rng(5))
        for options in (off, off | {option: 1.0})
    )
    assert torch.equal(plain[0].data, changed[0].data)
    assert not torch.equal(plain[1].data, changed[1].data)
    if option == "flip":
        assert torch.equal(plain[1].data.flip(-1), changed[1].data)


def test_views_of_another_augmentation_are_refused(registry: Registry) -> None:
    overrides = ["augment.image={name: multi_crop, size: 48}"]
    with pytest.raises(RecipeErrors) as caught:
        load_recipe(RECIPE, registry=registry, overrides=overrides)
    (line,) = caught.value.lines
    assert line.endswith("'simclr' needs 2 simclr view(s) of 'image'; its augmentation makes 0")
    load_recipe(RECIPE, registry=registry, overrides=[*overrides, "loss.1.role=local"])


def test_the_recipe_resolves(registry: Registry) -> None:
    recipe = load_recipe(RECIPE, registry=registry)
    assert [node.cls for node in recipe.loss] == [Clip, SimClr]
    assert recipe.plan.modalities["image"].roles == ("global", "simclr", "simclr")
