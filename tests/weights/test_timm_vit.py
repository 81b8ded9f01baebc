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


SIGLIP = (
    "backbone.image.pooling=attention", "backbone.image.pre_norm=false", "backbone.image.norm_eps=1e-6",
    "backbone.image.mlp_ratio=4.0",
)  # fmt: skip


def pooled_like(built: Any, model: Any, x: Tensor, dim: int) -> None:
    """The pooling's result, which is SigLIP's embedding and our class token, and the tokens."""
    with torch.no_grad():
        ours, theirs = built.backbone["image"](Views([Group(x[None])]), tokens_of=(0,)), model.forward_features(x)
        pooled = model.forward_head(theirs)
    torch.testing.assert_close(ours.class_tokens[0, :, 0], pooled, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.tokens[0], theirs, rtol=1e-5, atol=1e-5)
    assert torch.equal(ours.pooled, ours.class_tokens[:, :, 0]) == (dim == 24)


@pytest.mark.parametrize("dim", [24, 10])
def test_siglip(registry: Registry, tmp_path: Path, dim: int) -> None:
    """timm's attention pooling; open_clip's file of the same tower beside a text tower. Where D is W the embedding is
    the source's own; where it is not, the projection is new and the line says so."""
    model = vit("vit_base_patch16_siglip_224", img_size=16, patch_size=4, num_classes=0)
    state = model.state_dict()
    torch.save(state, tmp_path / "timm.pth")
    beside = {"text.token_embedding.weight": torch.zeros(3, 2), "logit_scale": torch.zeros(())}
    torch.save({f"visual.trunk.{key}": value for key, value in state.items()} | beside, tmp_path / "open_clip.pth")
    for file in ("timm.pth", "open_clip.pth"):
        built = objective(registry, *SIGLIP, f"backbone.image.dim={dim}", f"backbone.text.dim={dim}")
        loaded = apply(registry, built, "timm_vit", source=str(tmp_path / file))
        pooled_like(built, model, torch.randn(3, 3, 16, 16), dim)
        assert ("24 wide: the projection to 10 is new" in loaded.line) == (dim == 10)
    with pytest.raises(UserError, match="set pooling: attention"):
        apply(registry, objective(registry, *LIKE_TIMM), "timm_vit", source=str(tmp_path / "timm.pth"))


def test_siglip_of_another_size(registry: Registry, tmp_path: Path) -> None:
    """Its positions, none of them a class token's, are resized as the tower resizes them; a tower with a class token
    does not go into one with pooling."""
    model = vit("vit_base_patch16_siglip_224", img_size=32, patch_size=4, num_classes=0)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    wanted = vit("vit_base_patch16_siglip_224", img_size=16, patch_size=4, num_classes=0)
    table = model.state_dict()["pos_embed"].reshape(1, 8, 8, 24).permute(0, 3, 1, 2)
    table = nn.functional.interpolate(table, scale_factor=4.1 / 8, mode="bicubic", recompute_scale_factor=False)
    wanted.load_state_dict(model.state_dict() | {"pos_embed": table.flatten(2).mT})
    built = objective(registry, *SIGLIP, "backbone.image.dim=24", "backbone.text.dim=24")
    loaded = apply(registry, built, "timm_vit", source=str(tmp_path / "w.pth"))
    assert "image positions resized from 8 x 8 to 4 x 4" in loaded.line
    pooled_like(built, wanted, torch.randn(2, 3, 16, 16), 24)
    dino = vit("vit_tiny_patch16_224", img_size=16, patch_size=4)
    torch.save(dino.state_dict(), tmp_path / "dino.pth")
    with pytest.raises(UserError, match="set pooling: class_token"):
        apply(registry, objective(registry, *SIGLIP), "timm_vit", source=str(tmp_path / "dino.pth"))


@pytest.mark.parametrize("whole", [True, False])
def test_hf_siglip(registry: Registry, tmp_path: Path, whole: bool) -> None:
    """A SiglipModel or its image tower alone: Hugging Face's own pooled output and tokens; what differs is said."""
    transformers: Any = pytest.importorskip("transformers")
    torch.manual_seed(1)
    shape = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
    config = transformers.SiglipVisionConfig(image_size=16, patch_size=4, **shape)
    if whole:
        text = transformers.SiglipTextConfig(vocab_size=30, max_position_embeddings=8, **shape)
        model = transformers.SiglipModel(
            transformers.SiglipConfig(text_config=text.to_dict(), vision_config=config.to_dict())
        )
    else:
        model = transformers.SiglipVisionModel(config)
    scatter(model).save_pretrained(tmp_path)
    like = (*SIGLIP[:3], "backbone.image.mlp_ratio=2.0", "backbone.image.dim=24", "backbone.text.dim=24")
    built = objective(registry, *like, "backbone.image.activation=gelu_tanh")
    loaded = apply(registry, built, "hf_siglip", source=str(tmp_path))
    x = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        ours = built.backbone["image"](Views([Group(x[None])]), tokens_of=(0,))
        theirs = (model.vision_model if whole else model)(pixel_values=x)
    torch.testing.assert_close(ours.pooled[0], theirs.pooler_output, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.tokens[0], theirs.last_hidden_state, rtol=1e-5, atol=1e-5)
    assert "loss.contrastive" in loaded.line, "the scale learned with another text tower is not taken"
    with pytest.raises(UserError, match="set activation: gelu_tanh"):
        apply(registry, objective(registry, *like), "hf_siglip", source=str(tmp_path))
    with pytest.raises(UserError, match=r"backbone\.image\.heads is 4, the source was trained with 3"):
        apply(registry, objective(registry, *like, "backbone.image.heads=4"), "hf_siglip", source=str(tmp_path))


def test_what_hf_siglip_does_not_read(registry: Registry, tmp_path: Path) -> None:
    """A CLIP's folder, and one that lacks the head: one line, before anything is loaded."""
    transformers: Any = pytest.importorskip("transformers")
    shape = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 3}
    clip = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(image_size=16, patch_size=4, **shape))
    clip.save_pretrained(tmp_path / "clip")
    config = transformers.SiglipVisionConfig(image_size=16, patch_size=4, vision_use_head=False, **shape)
    transformers.SiglipVisionModel(config).save_pretrained(tmp_path / "headless")
    for folder, message in (
        ("clip", "model_type 'clip_vision_model', not 'siglip'"),
        ("headless", "lacks the pooling"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            apply(registry, objective(registry, *SIGLIP), "hf_siglip", source=str(tmp_path / folder))
        assert str(caught.value).count("\n") == 0


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("vit_giant_patch14_dinov2", r"it has a gated MLP \(SwiGLU\) \(blocks\.0\.mlp\.fc1\.weight\)"),
        ("vit_little_patch16_reg4_gap_256", "it has no cls_token"),
        ("vit_relpos_small_patch16_224", r"it has relative positions \(blocks\.0\.attn\.rel_pos"),
        ("beit_base_patch16_224", r"it has relative positions \(blocks\.0\.attn\.relative_position"),
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
