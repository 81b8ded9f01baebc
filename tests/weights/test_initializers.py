"""Weights of other libraries: our towers then compute what the library's own model computes."""

import importlib
import json
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from distill_core.batch import Group, Views
from distill_core.errors import UserError
from distill_core.objective import Objective
from distill_core.registry import Registry
from tests.weights.conftest import apply, objective, scatter

QUICK = ("backbone.image.activation=quick_gelu", "backbone.text.activation=quick_gelu")
CLIP_64 = (
    "backbone.image={name: vit, image_size: 16, patch: 4, width: 128, layers: 2, heads: 2, dim: 10}",
    "backbone.text={name: clip_text, width: 64, layers: 2, heads: 1, dim: 10}",
)
"""Heads of width 64, as the files of OpenAI imply."""
IDS = torch.tensor([[49406, 320, 4558, 49407, 0, 0], [49406, 49407, 0, 0, 0, 0], [49406, 7, 8, 9, 10, 49407]])


def pooled(built: Objective, modality: str, x: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = built.backbone[modality](Views([Group(x[None])])).pooled[0]
    return found


def open_clip_model(quick: bool, size: int = 16, context: int = 77) -> Any:
    open_clip = pytest.importorskip("open_clip")
    vision = {"image_size": size, "patch_size": 4, "width": 128, "layers": 2, "head_width": 64}
    text = {"context_length": context, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2}
    return scatter(open_clip.model.CLIP(10, vision, text, quick_gelu=quick))


def test_what_stays_new_is_named_by_its_part_of_the_recipe(registry: Registry, tmp_path: Path) -> None:
    """Catches named fusions that all are `fusions`, and a line for each of a decoder's tensors."""
    built = objective(
        registry,
        *CLIP_64,
        "fusions={other: {name: cross_attention, heads: 2}}",
        "heads={decoder: {name: caption_decoder, width: 16, layers: 1, heads: 2}}",
        "loss.2={name: captioning}",
        "balance=uncertainty",
    )
    torch.save(open_clip_model(quick=False).state_dict(), tmp_path / "clip.pt")
    line = apply(registry, built, "open_clip", source=str(tmp_path / "clip.pt")).line
    assert line.endswith(
        "initialised anew: fusion.token_map, fusion.pooler, heads.decoder, fusions.other.token_map, "
        "fusions.other.pooler, loss.cross_modal_distillation, balance"
    )


def test_openai(registry: Registry, tmp_path: Path) -> None:
    """Their state dicts are half precision, hold three sizes, and were trained with QuickGELU."""
    model = open_clip_model(quick=True).half().float()
    sizes = {
        "input_resolution": torch.tensor(16),
        "context_length": torch.tensor(77),
        "vocab_size": torch.tensor(49408),
    }
    torch.save({k: v.half() for k, v in model.state_dict().items()} | sizes, tmp_path / "openai.pt")
    built = objective(registry, *CLIP_64, *QUICK)
    loaded = apply(registry, built, "open_clip", source=str(tmp_path / "openai.pt"))
    x = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(pooled(built, "image", x), model.encode_image(x), rtol=1e-4, atol=1e-4)
        padded = torch.nn.functional.pad(IDS, (0, 71))
        torch.testing.assert_close(pooled(built, "text", IDS), model.encode_text(padded), rtol=1e-4, atol=1e-4)
    scale = built.loss["contrastive"].get_parameter("logit_scale")
    assert float(scale) == pytest.approx(model.logit_scale.item(), rel=1e-3)
    assert "does not say" not in loaded.line
    with pytest.raises(UserError, match="set activation: quick_gelu"):
        apply(registry, objective(registry, *CLIP_64), "open_clip", source=str(tmp_path / "openai.pt"))


def test_open_clip_checkpoints_of_another_size(registry: Registry, tmp_path: Path) -> None:
    """As training writes them: nested, `module.` in front. Positions are resized and cut, and the line says so."""
    model = open_clip_model(quick=False, size=24)
    state = {f"module.{key}": value for key, value in model.state_dict().items()}
    torch.save({"epoch": 3, "name": "run", "state_dict": state}, tmp_path / "epoch_3.pt")
    built = objective(registry, *CLIP_64, "backbone.text.context=9")
    loaded = apply(registry, built, "open_clip", source=str(tmp_path / "epoch_3.pt"))
    assert "image positions resized from 6 x 6 to 4 x 4" in loaded.line
    assert "9 of 77 text positions" in loaded.line
    assert "it does not say heads and activation of text: as the recipe has them" in loaded.line
    table = built.backbone["image"].get_parameter("positional_embedding")
    whole = model.visual.positional_embedding[1:].reshape(1, 6, 6, 128).permute(0, 3, 1, 2)
    resized = nn.functional.interpolate(whole, scale_factor=4.1 / 6, mode="bicubic", recompute_scale_factor=False)
    torch.testing.assert_close(table[1:], resized[0].flatten(1).T, rtol=1e-4, atol=1e-5)
    assert torch.equal(table[0], model.visual.positional_embedding[0])
    with torch.no_grad():
        padded = torch.nn.functional.pad(IDS, (0, 71))
        torch.testing.assert_close(pooled(built, "text", IDS), model.encode_text(padded), rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="context is 90, the source has 77"):
        apply(
            registry, objective(registry, *CLIP_64, "backbone.text.context=90"), "open_clip",
            source=str(tmp_path / "epoch_3.pt"),
        )  # fmt: skip


def test_one_tower_alone(registry: Registry, tmp_path: Path) -> None:
    model = open_clip_model(quick=False)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    built = objective(registry, CLIP_64[1], "backbone.image.width=24")
    before = built.backbone["image"].get_parameter("proj").clone()
    loaded = apply(registry, built, "open_clip", source=str(tmp_path / "w.pt"), image=None)
    assert not any(name.startswith("backbone.image") for name in loaded.names)
    assert torch.equal(built.backbone["image"].get_parameter("proj"), before)
    assert torch.equal(built.backbone["text"].get_parameter("text_projection"), model.text_projection)


def test_nothing_is_loaded_where_something_is_wrong(registry: Registry, tmp_path: Path) -> None:
    model = open_clip_model(quick=False)
    state = model.state_dict()
    del state["ln_final.weight"]
    torch.save(state, tmp_path / "w.pt")
    built = objective(registry, *CLIP_64, "backbone.image.layers=1", "backbone.image.dim=10")
    before = {name: value.clone() for name, value in built.state_dict().items()}
    with pytest.raises(UserError) as caught:
        apply(registry, built, "open_clip", source=str(tmp_path / "w.pt"))
    assert "backbone.text.ln_final.weight: missing in it" in str(caught.value)
    assert "transformer.resblocks.1.ln_1.weight: not in backbone.image" in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in built.state_dict().items())


def test_hugging_face(registry: Registry, tmp_path: Path) -> None:
    """A CLIPModel of random weights, in a folder of two parts; what its config says is held against the recipe."""
    hf = pytest.importorskip("transformers")
    vision = {"image_size": 16, "patch_size": 4, "hidden_size": 24, "intermediate_size": 72, "num_attention_heads": 3,
              "num_hidden_layers": 2, "hidden_act": "gelu", "projection_dim": 10}  # fmt: skip
    text = {"hidden_size": 16, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2,
            "hidden_act": "gelu", "projection_dim": 10}  # fmt: skip
    model = scatter(hf.CLIPModel(hf.CLIPConfig(vision_config=vision, text_config=text, projection_dim=10)))
    model.save_pretrained(tmp_path / "clip", max_shard_size="2MB")
    assert (tmp_path / "clip/model.safetensors.index.json").is_file(), "one part: the index was not tested"
    built = objective(registry)
    apply(registry, built, "hf_clip", source=str(tmp_path / "clip"))
    x = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        found = model(pixel_values=x, input_ids=IDS)
    unit = torch.nn.functional.normalize
    torch.testing.assert_close(unit(pooled(built, "image", x), dim=-1), found.image_embeds, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(unit(pooled(built, "text", IDS), dim=-1), found.text_embeds, rtol=1e-4, atol=1e-5)
    config = json.loads((tmp_path / "clip/config.json").read_text())
    config["vision_config"]["num_attention_heads"] = 6
    config["text_config"]["layer_norm_eps"] = 1e-3
    (tmp_path / "clip/config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="heads is 3, the source was trained with 6") as caught:
        apply(registry, built, "hf_clip", source=str(tmp_path / "clip"))
    assert "LayerNorms add 0.001" in str(caught.value)


def test_files_that_are_not_what_they_should_be(registry: Registry, tmp_path: Path) -> None:
    built = objective(registry)
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "archive.pt")
    torch.save({"layer1.0.conv1.weight": torch.zeros(1)}, tmp_path / "other.pt")
    torch.save({"visual.layer1.0.conv1.weight": torch.zeros(1)}, tmp_path / "resnet.pt")
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    for name, message in (
        ("archive.pt", "a TorchScript archive, which is code"),
        ("other.pt", "is no tensor of a CLIP"),
        ("resnet.pt", "its picture tower is a ResNet"),
        ("junk.safetensors", "cannot be loaded"),
        ("nowhere.pt", "no such file"),
        (".", "open_clip_config.json: cannot be read"),
    ):
        with pytest.raises(UserError, match=message):
            apply(registry, built, "open_clip", source=str(tmp_path / name))


def test_sources_that_are_not_what_they_say(registry: Registry, tmp_path: Path) -> None:
    """Each would be a traceback: a config of another kind, a table of no grid, an index of numbers."""
    built = objective(registry)
    state = {f"visual.{k}": v.detach() for k, v in built.backbone["image"].named_parameters() if k != "mask_token"}
    (tmp_path / "a").mkdir()
    torch.save(state, tmp_path / "a/open_clip_pytorch_model.bin")
    for config, message in (
        ({"vision_cfg": [1]}, "vision_cfg is no object of options"),
        ({"vision_cfg": {"width": "wide"}}, r"not what 'open_clip' reads \(TypeError: "),
        ({"vision_cfg": {"head_width": 0}}, r"not what 'open_clip' reads \(ZeroDivisionError: "),
    ):
        (tmp_path / "a/open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
        with pytest.raises(UserError, match=message):
            apply(registry, built, "open_clip", source=str(tmp_path / "a"), text=None)
    for table, message in (
        (torch.zeros(1, 24), "the source's 1 positions are no square and a class token"),
        (torch.zeros(24), r"positional_embedding: shape \[24\], not \[positions, width\]"),
        (torch.tensor(1.0), r"positional_embedding: shape \[\], not"),
    ):
        torch.save(state | {"visual.positional_embedding": table}, tmp_path / "w.pt")
        with pytest.raises(UserError, match=message):
            apply(registry, built, "open_clip", source=str(tmp_path / "w.pt"), text=None)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/config.json").write_text(json.dumps({"model_type": "clip", "vision_config": [1]}))
    (tmp_path / "hf/model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": 3}}))
    with pytest.raises(UserError, match="does not name files of its own folder"):
        apply(registry, built, "hf_clip", source=str(tmp_path / "hf"))
    save_file({"logit_scale": torch.tensor(1.0)}, tmp_path / "hf/model.safetensors")
    with pytest.raises(UserError, match=r"not what 'hf_clip' reads \(AttributeError: "):
        apply(registry, built, "hf_clip", source=str(tmp_path / "hf"))


PIXELS = ("augment.image.mean=[0.6, 0.4, 0.3]", "augment.image.std=[0.2, 0.25, 0.3]")
TOLD = (
    "the source was trained with other pixels: set augment.image.mean: [0.6, 0.4, 0.3] and augment.image.std: "
    "[0.2, 0.25, 0.3]"
)


def hold(registry: Registry, name: str, source: Path, *overrides: str, **options: Any) -> None:
    """The recipe of conftest has another mean: the line says what to set; once it is set, nothing is told."""
    for more in ((), PIXELS):
        line = apply(registry, objective(registry, *overrides, *more), name, source=str(source), **options).line
        assert line.count(TOLD) == line.count("other pixels") == (not more), line


def test_mean_and_std_of_open_clip(registry: Registry, tmp_path: Path) -> None:
    """What open_clip writes of its transform; what is no mean of three channels is nothing to tell."""
    pytest.importorskip("open_clip")
    save = importlib.import_module("open_clip.push_to_hf_hub").save_config_for_hf
    state = {f"visual.{k}": v.detach() for k, v in objective(registry).backbone["image"].named_parameters()}
    torch.save(state, tmp_path / "open_clip_pytorch_model.bin")
    vision = {"image_size": 16, "patch_size": 4, "width": 24, "layers": 2, "head_width": 8, "mlp_ratio": 3.0}
    transform = types.SimpleNamespace(image_mean=[0.6, 0.4, 0.3], image_std=[0.2, 0.25, 0.3])
    path = tmp_path / "open_clip_config.json"
    save(types.SimpleNamespace(visual=transform), path, {"vision_cfg": vision, "text_cfg": {}})
    hold(registry, "open_clip", tmp_path, text=None)
    config = json.loads(path.read_text())
    for broken in (None, 0.5, [0.5], ["a", "b", "c"]):
        config["preprocess_cfg"]["mean"] = broken
        path.write_text(json.dumps(config))
        loaded = apply(registry, objective(registry), "open_clip", source=str(tmp_path), text=None)
        assert "other pixels" not in loaded.line


@pytest.mark.slow
@pytest.mark.parametrize("whole", [False, True])
def test_mean_and_std_of_hugging_face(registry: Registry, tmp_path: Path, whole: bool) -> None:
    """An image processor's own file, or a processor's of both."""
    hf = pytest.importorskip("transformers")
    vision = {"image_size": 16, "patch_size": 4, "hidden_size": 24, "intermediate_size": 72, "num_attention_heads": 3,
              "num_hidden_layers": 2, "hidden_act": "gelu", "projection_dim": 10}  # fmt: skip
    hf.CLIPModel(hf.CLIPConfig(vision_config=vision, projection_dim=10)).save_pretrained(tmp_path)
    hf.CLIPImageProcessor(image_mean=[0.6, 0.4, 0.3], image_std=[0.2, 0.25, 0.3]).save_pretrained(tmp_path)
    if whole:
        own = tmp_path / "preprocessor_config.json"
        (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": json.loads(own.read_text())}))
        own.unlink()
    hold(registry, "hf_clip", tmp_path, text=None)


def test_mean_and_std_of_timm(registry: Registry, tmp_path: Path) -> None:
    """A folder as timm writes it for a hub."""
    timm = pytest.importorskip("timm")
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3, mlp_ratio=3, num_classes=0
    )
    model.pretrained_cfg = {
        "architecture": "mine", "input_size": (3, 16, 16), "mean": (0.6, 0.4, 0.3), "std": (0.2, 0.25, 0.3),
    }  # fmt: skip
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    hold(registry, "timm_vit", tmp_path, "backbone.image.pre_norm=false", "backbone.image.norm_eps=1e-6")
