"""ViTs of timm, DINO and DINOv2 in our `vit`: timm's own model of the same weights gives the same features."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill_core.batch import Group, Views
from distill_core.errors import UserError
from distill_core.registry import Registry
from tests.weights.conftest import apply, objective, scatter

timm: Any = pytest.importorskip("timm")

LIKE_TIMM = ("backbone.image.pre_norm=false", "backbone.image.norm_eps=1e-6", "backbone.image.mlp_ratio=4.0")
SIZED_14 = ("backbone.image.patch=14", "augment.image.local_size=14")
DINOV2 = (*LIKE_TIMM, *SIZED_14, "backbone.image.image_size=42", "augment.image.size=42")
"""A grid of 3 x 3."""


def vit(model: str, **options: Any) -> Any:
    """One of timm's architectures, small, with everything random: LayerScale as well."""
    torch.manual_seed(1)
    return scatter(
        timm.create_model(model, pretrained=False, **{"depth": 2, "embed_dim": 24, "num_heads": 3} | options)
    )


def same(built: Any, model: Any, x: Tensor) -> None:
    """Class token and patch tokens, after the last LayerNorm."""
    with torch.no_grad():
        ours = built.backbone["image"](Views([Group(x[None])]), tokens_of=(0,))
        theirs = model.forward_features(x)
    torch.testing.assert_close(ours.class_tokens[0, :, 0], theirs[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.tokens[0], theirs[:, model.num_prefix_tokens :], rtol=1e-5, atol=1e-5)


def test_dino(registry: Registry, tmp_path: Path) -> None:
    """In spite of the patches' bias and the missing first LayerNorm; of several state dicts the one that is named.

    Heads are 32 wide, as ViT-H's are not 64 either: a width that is made up would be held against the recipe.
    """
    model = vit("vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=96, num_classes=5)
    state = {f"module.backbone.{key}": value for key, value in model.state_dict().items()}
    torch.save({"student": {"x": torch.zeros(1)}, "teacher": state}, tmp_path / "dino.pth")
    wide = (*LIKE_TIMM, "backbone.image.width=96")
    built = objective(registry, *wide)
    source = str(tmp_path / "dino.pth")
    loaded = apply(registry, built, "timm_vit", source=source, key="teacher")
    same(built, model, torch.randn(3, 3, 16, 16))
    assert "initialised anew: backbone.image.proj, " in loaded.line
    assert "it does not say heads of image" in loaded.line
    with pytest.raises(UserError, match="set pre_norm: False"):
        apply(registry, objective(registry, *wide, "backbone.image.pre_norm=true"), "timm_vit", source=source,
              key="teacher")  # fmt: skip
    with pytest.raises(UserError, match=r"holds no state dict 'ema' \(there are: student, teacher\)"):
        apply(registry, built, "timm_vit", source=source, key="ema")
    with pytest.raises(UserError, match="holds 2 state dicts: student, teacher; say which: key: student"):
        apply(registry, built, "timm_vit", source=source)


@pytest.mark.parametrize("half", [False, True])
def test_dinov2(registry: Registry, tmp_path: Path, half: bool) -> None:
    """LayerScale of any size and sign goes into the weights, also where the file is in half precision."""
    model = vit("vit_small_patch14_dinov2", img_size=42, init_values=1.0)
    if half:
        model.half().float()
    state = {key: value.half() if half else value for key, value in model.state_dict().items()}
    assert state["blocks.1.ls2.gamma"].std() > 0.1, "LayerScale is constant: nothing was tested"
    torch.save(state | {"mask_token": torch.zeros(1, 24)}, tmp_path / "dinov2.pth")
    built = objective(registry, *DINOV2)
    loaded = apply(registry, built, "timm_vit", source=str(tmp_path / "dinov2.pth"))
    same(built, model, torch.randn(3, 3, 42, 42))
    assert "LayerScale was folded into 4 layers (attn.proj, mlp.fc2)" in loaded.line


@pytest.mark.parametrize("name", ["reg_token", "register_tokens"])
def test_dinov2_with_registers(registry: Registry, tmp_path: Path, name: str) -> None:
    """They are `vit`'s further class tokens; a recipe without so many is told the number."""
    model = vit("vit_small_patch14_reg4_dinov2", img_size=42, init_values=1.0)
    torch.save({key.replace("reg_token", name): value for key, value in model.state_dict().items()}, tmp_path / "w.pth")
    built = objective(registry, *DINOV2, "backbone.image.class_tokens=5")
    apply(registry, built, "timm_vit", source=str(tmp_path / "w.pth"))
    same(built, model, torch.randn(3, 3, 42, 42))
    with pytest.raises(UserError, match="set class_tokens: 5"):
        apply(registry, objective(registry, *DINOV2), "timm_vit", source=str(tmp_path / "w.pth"))


def test_dinov2_of_another_size(registry: Registry, tmp_path: Path) -> None:
    """Its positions are resized as DINOv2 itself does it (interpolate_offset 0.1)."""
    model = vit("vit_small_patch14_dinov2", img_size=70, init_values=1.0)
    torch.save(model.state_dict(), tmp_path / "dinov2.pth")
    built = objective(registry, *DINOV2)
    loaded = apply(registry, built, "timm_vit", source=str(tmp_path / "dinov2.pth"))
    assert "image positions resized from 5 x 5 to 3 x 3" in loaded.line
    small = vit("vit_small_patch14_dinov2", img_size=42, init_values=1.0)
    state = model.state_dict()
    table = state["pos_embed"][:, 1:].reshape(1, 5, 5, 24).permute(0, 3, 1, 2)
    table = nn.functional.interpolate(table, scale_factor=3.1 / 5, mode="bicubic", recompute_scale_factor=False)
    small.load_state_dict(state | {"pos_embed": torch.cat([state["pos_embed"][:, :1], table.flatten(2).mT], 1)})
    same(built, small, torch.randn(2, 3, 42, 42))


def test_deit3(registry: Registry, tmp_path: Path) -> None:
    """Its class token has no position; its first releases name LayerScale otherwise."""
    model = vit("deit3_small_patch16_224", img_size=16, patch_size=4)
    state = {key.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): value
             for key, value in model.state_dict().items()}  # fmt: skip
    assert "blocks.0.gamma_1" in state
    assert state["pos_embed"].shape[1] == 16
    torch.save({"model": state}, tmp_path / "deit3.pth")
    built = objective(registry, *LIKE_TIMM)
    assert "its 'model' was used" in apply(registry, built, "timm_vit", source=str(tmp_path / "deit3.pth")).line
    same(built, model, torch.randn(3, 3, 16, 16))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("vit_giant_patch14_dinov2", r"it has a gated MLP \(SwiGLU\) \(blocks\.0\.mlp\.fc1\.weight\)"),
        ("vit_little_patch16_reg4_gap_256", "it has no cls_token"),
        ("vit_relpos_small_patch16_224", r"it has relative positions \(blocks\.0\.attn\.rel_pos"),
        ("beit_base_patch16_224", r"it has relative positions \(blocks\.0\.attn\.relative_position"),
        ("vit_base_patch16_siglip_224", "it has no cls_token"),
    ],
)
def test_what_vit_has_not_is_refused(registry: Registry, tmp_path: Path, model: str, message: str) -> None:
    """What it is, and the way out: timm's own tower, which then takes the file."""
    torch.save(vit(model, num_classes=0).state_dict(), tmp_path / "w.pth")
    with pytest.raises(UserError, match=message) as caught:
        apply(registry, objective(registry, *DINOV2), "timm_vit", source=str(tmp_path / "w.pth"))
    assert "the backbone {name: timm, model: MODEL} with the weights {name: timm, source: " in str(caught.value)
    assert str(caught.value).count("\n") == 0


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (("blocks.0.mlp.w12.weight", "blocks.0.ls2.gamma"), r"a gated MLP \(SwiGLU\) \(blocks\.0\.mlp\.w12\.weight\)"),
        (("blocks.0.0.norm1.weight",), r"blocks in chunks \(blocks\.0\.0\.norm1\.weight\)"),
        (("blocks.0.attn.q_norm.weight",), "LayerNorms of queries and keys"),
        (("cls_token", "rope_embed.periods"), r"it has no table of positions \(pos_embed\)"),
        (
            ("cls_token", "pos_embed", "patch_embed.proj.weight", "neck.weight"),
            "it has neck.weight, unlike `vit`: take",
        ),
    ],
)
def test_names_of_other_releases(registry: Registry, tmp_path: Path, keys: tuple[str, ...], message: str) -> None:
    """As DINOv2's and DINOv3's own files have them."""
    torch.save({key: torch.zeros(2, 2) for key in keys}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=message):
        apply(registry, objective(registry, *LIKE_TIMM), "timm_vit", source=str(tmp_path / "w.pth"))
