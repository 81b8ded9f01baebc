"""timm's models as backbones: their own features come through, other sizes work or are refused in one line."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distill_core.batch import GLOBAL, LOCAL, Batch, Group, Views
from distill_core.errors import RecipeErrors, UserError
from distill_core.objective import Objective
from distill_core.outputs import Progress
from distill_core.recipe.build import build_objective
from distill_core.recipe.resolve import parse_recipe
from distill_core.registry import Registry
from distill_core.system.extras import install
from distill_pretrained import timm_tower
from distill_pretrained.timm_tower import TimmTower, TimmTowerConfig
from distill_pretrained.timm_weights import TimmWeights, TimmWeightsConfig

timm: Any = pytest.importorskip("timm")

RECIPE = """
augment:
  image: {name: multi_crop, size: 64, local_size: 32, local: 1}
  text: {name: text_crop, local: 1}
backbone:
  image: {name: timm, model: test_vit, image_size: 64, dim: 8}
  text: {name: clip_text, width: 16, layers: 1, heads: 2, dim: 8}
fusion: {name: cross_attention, heads: 2}
loss: [{name: contrastive}, {name: cross_modal_distillation}]
teacher: {}
freeze: [backbone.image.model]
data: {source: {name: emoji}}
train: {steps: 1}
"""


def tower(model: str, image_size: int) -> TimmTower:
    torch.manual_seed(0)
    return TimmTower(TimmTowerConfig(model=model, image_size=image_size, dim=8)).eval()


@pytest.mark.parametrize("model", ["test_vit", "test_resnet"])
def test_features_are_the_models_own(model: str) -> None:
    """Tokens without the class token; a feature map's places row by row."""
    module, x = tower(model, 64), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        features = module.encode(x, tokens=True, token_mask=None)
        other = timm.create_model(model, num_classes=0, **({"img_size": 64} if model == "test_vit" else {})).eval()
        other.load_state_dict(module.model.state_dict())
        found = other.forward_features(x)
        torch.testing.assert_close(features.pooled, other(x) @ module.proj.weight.T)
    if model == "test_vit":
        torch.testing.assert_close(features.tokens, found[:, 1:])
    else:
        torch.testing.assert_close(features.tokens[:, 3], found[:, :, 1, 1])  # of 2 x 2 places
    spec = TimmTower.spec(module.config)
    assert features.tokens.shape[-1] == spec.width
    assert features.class_tokens is not None
    assert features.class_tokens.shape[-1] == spec.width


def test_crops_of_other_sizes() -> None:
    vit = tower("test_vit", 64)
    assert vit.encode(torch.randn(2, 3, 32, 32), tokens=True, token_mask=None).tokens.shape[1] == 4
    with pytest.raises(UserError, match="crops of 40 px are not whole patches of 16 px"):
        vit.encode(torch.randn(2, 3, 40, 40), tokens=False, token_mask=None)
    mixer = tower("mixer_s32_224", 64)  # its weights mix places: one size alone
    with pytest.raises(UserError, match="takes pictures of 64 px alone, not of 32"):
        mixer.encode(torch.randn(2, 3, 32, 32), tokens=False, token_mask=None)


def objective(registry: Registry, **changes: str) -> Objective:
    overrides = [f"{key}={value}" for key, value in changes.items()]
    return build_objective(parse_recipe(RECIPE, "r.yaml", registry=registry, overrides=overrides))


def test_a_step_of_cosmos_with_a_frozen_tower(registry: Registry) -> None:
    """Fusion reads the tower's tokens; only its projection learns."""
    torch.manual_seed(0)
    built = objective(registry)
    trained = {name for name, _, _ in built.trainable(["backbone.image.model"], {})}
    assert "backbone.image.proj.weight" in trained
    assert not any(name.startswith("backbone.image.model") for name in trained)

    def crops(side: int, role: str, count: int) -> Group:
        return Group(torch.randn(count, 3, 3, side, side), role)

    def texts(role: str, count: int) -> Group:
        ids = torch.cat([torch.full((count, 3, 1), 49406), torch.randint(1, 99, (count, 3, 4)),
                         torch.full((count, 3, 1), 49407)], -1)  # fmt: skip
        return Group(ids, role)

    views = {
        "image": Views([crops(64, GLOBAL, 2), crops(32, LOCAL, 1)]),
        "text": Views([texts(GLOBAL, 2), texts(LOCAL, 1)]),
    }
    batch = Batch(views, ["a", "b", "c"])
    built.train()
    built.losses(built.represent(batch, Progress(0, 1))).total.backward()
    image: Any = built.backbone["image"]
    assert image.proj.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in image.model.parameters())
    assert not image.model.training


def test_weights(registry: Registry, tmp_path: Path) -> None:
    """Another size's position embeddings are resized by timm; the classifier is left."""
    source = timm.create_model("test_vit", img_size=32, num_classes=7)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    built = objective(registry)
    loaded = TimmWeights(TimmWeightsConfig(source=str(tmp_path / "w.pth"))).apply(built)
    image: Any = built.backbone["image"]
    assert torch.equal(image.model.blocks[0].mlp.fc1.weight, source.blocks[0].mlp.fc1.weight)
    assert image.model.pos_embed.shape[1] == 17
    assert "backbone.image.model.pos_embed" in loaded.names
    assert "; backbone.image.proj is new; left out: head" in loaded.line


@pytest.mark.slow
def test_weights_of_a_checkpoint(registry: Registry, tmp_path: Path) -> None:
    """timm's own reader takes the EMA's; the line says so, and of timm's mean and std (0.5), which the recipe lacks."""
    own, ema = (timm.create_model("test_vit", img_size=64, num_classes=0) for _ in range(2))
    states = {
        "epoch": 3,
        "state_dict": own.state_dict(),
        "state_dict_ema": {f"module._orig_mod.{key}": value for key, value in ema.state_dict().items()},
    }
    torch.save(states, tmp_path / "w.pth")
    assert timm.models.load_state_dict(tmp_path / "w.pth")["norm.weight"].equal(ema.norm.weight)
    for key, model in ((None, ema), ("state_dict", own)):
        built = objective(registry)
        loaded = TimmWeights(TimmWeightsConfig(source=str(tmp_path / "w.pth"), key=key)).apply(built)
        image: Any = built.backbone["image"]
        assert torch.equal(image.model.blocks[0].mlp.fc1.weight, model.blocks[0].mlp.fc1.weight)
        told = "its 'state_dict_ema' was used (`key` may also be: state_dict)"
        assert (told in loaded.line) == (key is None)
    told = (
        "were trained with other pixels: set augment.image.mean: [0.5, 0.5, 0.5] and augment.image.std: [0.5, 0.5, 0.5]"
    )
    assert f"timm's own weights of test_vit {told}" in loaded.line
    same = objective(registry, **{f"augment.image.{name}": "[0.5, 0.5, 0.5]" for name in ("mean", "std")})
    loaded = TimmWeights(TimmWeightsConfig(source=str(tmp_path / "w.pth"))).apply(same)
    assert "pixels" not in loaded.line


def test_weights_that_do_not_fit(registry: Registry, tmp_path: Path) -> None:
    built = objective(registry)
    before = {name: value.clone() for name, value in built.state_dict().items()}
    torch.save(timm.create_model("test_vit2", num_classes=0).state_dict(), tmp_path / "other.pth")
    torch.save({"a": "text"}, tmp_path / "text.pth")
    (tmp_path / "junk.pth").write_bytes(b"junk")
    for name, message in (
        ("other.pth", "does not fit 'test_vit'"),
        ("text.pth", "cannot be loaded|no state dict"),
        ("junk.pth", "cannot be loaded"),
        ("none.pth", "no such file"),
    ):
        with pytest.raises(UserError, match=message):
            TimmWeights(TimmWeightsConfig(source=str(tmp_path / name))).apply(built)
    with pytest.raises(UserError, match=r"backbone\.text is no `timm`"):
        TimmWeights(TimmWeightsConfig(source="x", to="text")).apply(built)
    now: dict[str, Tensor] = built.state_dict()
    assert all(torch.equal(value, now[name]) for name, value in before.items())


def test_a_recipe_is_refused_at_its_line(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeErrors, match=r"r\.yaml:6: backbone\.image: timm has no model 'test_vitt', did you mean"):
        objective(registry, **{"backbone.image.model": "test_vitt"})
    timm_tower.shape_of.cache_clear()
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(RecipeErrors, match=r"r\.yaml:6: .*" + re.escape(install("timm"))):
        objective(registry)
