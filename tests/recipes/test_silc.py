"""SILC is made of other methods' parts: what its recipe makes of them."""

from pathlib import Path

import torch
from torch import Tensor

from distill_core.interfaces import Loss
from distill_core.outputs import Features, Outputs
from distill_core.recipe.resolve import load_recipe
from distill_core.registry import Registry

RECIPE = Path(__file__).parents[2] / "recipes/silc_tiny.yaml"


def info_nce(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Cosines times the scale; the diagonal is right, both ways."""
    cosines = torch.stack([torch.stack([torch.cosine_similarity(x, y, dim=0) for y in b]) for x in a])
    logits = scale * cosines
    return -(logits.log_softmax(0).diag().mean() + logits.log_softmax(1).diag().mean()) / 2


def test_both_global_crops_meet_the_caption_and_only_the_picture_has_a_teacher(registry: Registry) -> None:
    """Catches a local crop in the contrastive loss, a global one that is left out, and a text tower that is copied."""
    recipe = load_recipe(RECIPE, registry=registry)
    image, text = (recipe.plan.modalities[m] for m in ("image", "text"))
    assert image.roles == ("global", "global", "local", "local")
    assert tuple(recipe.plan.teacher_views("default", name) for name in ("image", "text")) == ((0, 1), ())
    assert [node.cls.name for node in recipe.loss] == ["contrastive", "dino"]
    assert recipe.teacher is not None
    assert not recipe.teacher.config.momentum.moves, "a fixed momentum"
    torch.manual_seed(0)
    pictures, captions = torch.randn(4, 5, image.spec.dim).double(), torch.randn(1, 5, text.spec.dim).double()
    outputs = Outputs(student={"image": Features(pictures), "text": Features(captions)})
    contrastive: Loss = recipe.loss[0].build(recipe.plan).double()
    scale = 1 / recipe.loss[0].config.temperature
    expected = (info_nce(pictures[0], captions[0], scale) + info_nce(pictures[1], captions[0], scale)) / 2
    # the scale is held in fp32, as a parameter starts
    torch.testing.assert_close(contrastive(outputs)[0]["contrastive"], expected, rtol=1e-6, atol=0)
