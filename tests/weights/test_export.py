"""Exports, loaded as a user of the other library loads them, embed what the run embeds."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

import distill_core
from distill_core.components import Loaded
from distill_core.errors import UserError
from distill_core.registry import Registry
from distill_core.resolve import parse_recipe
from distill_weights import export as exporting
from distill_weights.commands import export
from tests.weights.conftest import RECIPE, objective

TEXTS = ["a boat", "the quiet old river, and a house!", "red " * 100]


@pytest.fixture
def pictures() -> list[Image.Image]:
    rng = np.random.default_rng()
    return [Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(3)]


def call(run: Path, to: str, out: Path, *more: str) -> str:
    """What `distill export` prints. Raises what it raises."""
    done = CliRunner().invoke(export, [str(run), "--to", to, "--out", str(out), *more], catch_exceptions=False)
    return done.output


def close(theirs: Tensor, ours: Tensor) -> None:
    torch.testing.assert_close(normalize(theirs.float(), dim=-1), ours, rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_open_clip(run: Path, tmp_path: Path, pictures: list[Image.Image], side: str) -> None:
    """Its own transform and tokenizer included; the teacher's weights are others."""
    open_clip = pytest.importorskip("open_clip")
    printed = call(run, "open_clip", tmp_path / "out", *(["--teacher"] if side == "teacher" else []))
    assert printed.count("maximum difference") == 2
    assert "left out: fusion (cross_attention)" in printed
    name = f"local-dir:{tmp_path / 'out'}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    model.eval()
    ours = distill_core.load(run, teacher=side == "teacher")
    with torch.no_grad():
        close(model.encode_image(torch.stack([preprocess(p) for p in pictures])), ours.encode("image", pictures))
        close(model.encode_text(open_clip.get_tokenizer(name)(TEXTS)), ours.encode("text", TEXTS))
    state = torch.load(run / "checkpoints/step-00000007.pt", weights_only=True)["objective"]
    assert model.logit_scale.item() == pytest.approx(float(state["loss.contrastive.logit_scale"]))
    other = distill_core.load(run, teacher=side == "student").encode("text", TEXTS)
    assert not torch.allclose(other, ours.encode("text", TEXTS), atol=1e-2), "both sides are one: nothing was tested"


def test_hugging_face(run: Path, tmp_path: Path, pictures: list[Image.Image]) -> None:
    """CLIPModel and CLIPProcessor from the folder; also padding by its own token."""
    transformers = pytest.importorskip("transformers")
    call(run, "hf", tmp_path / "out")
    model = transformers.CLIPModel.from_pretrained(tmp_path / "out").eval()
    processor = transformers.CLIPProcessor.from_pretrained(tmp_path / "out")
    inputs = processor(text=TEXTS, images=pictures, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        found = model(**inputs)
    ours = distill_core.load(run)
    close(found.text_embeds, ours.encode("text", TEXTS))
    theirs = model.vision_model.config
    assert (theirs.image_size, theirs.patch_size, theirs.num_attention_heads) == (16, 4, 3)
    # its bicubic resizing of bytes may be a level off; the towers' own input is exact
    own = torch.stack([ours.augment["image"].plain(p).data for p in pictures])
    with torch.no_grad():
        close(model(input_ids=inputs["input_ids"], pixel_values=own).image_embeds, ours.encode("image", pictures))
    torch.testing.assert_close(inputs["pixel_values"], own, rtol=0, atol=0.05)


def test_onnx(run: Path, tmp_path: Path, pictures: list[Image.Image]) -> None:
    """Batches of 1 and 3, and ids padded further than the run pads them."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    call(run, "onnx", tmp_path / "out")
    ours = distill_core.load(run)
    told = json.loads((tmp_path / "out/preprocess.json").read_text())
    pixels = torch.stack([ours.augment["image"].plain(p).data for p in pictures])
    ids = ours.collators["text"]([[ours.augment["text"].plain(t)] for t in TEXTS], [0] * 3).groups[0].x[0]
    for name, x, items in (("image", pixels, pictures), ("text", ids, TEXTS)):
        session = onnxruntime.InferenceSession(tmp_path / "out" / told[name]["file"])
        for some in (slice(0, 1), slice(0, 3)):
            (found,) = session.run(None, {told[name]["input"]: x[some].numpy()})
            close(torch.from_numpy(found), ours.encode(name, items[some]))
    short = ids[:1, : int(ids[0].argmax()) + 3]
    close(torch.from_numpy(session.run(None, {"text": short.numpy()})[0]), ours.encode("text", TEXTS[:1]))


def test_onnx_takes_other_towers(
    make_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is no CLIP; a tower that cannot be traced is named."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("timm")
    timm = "backbone.image={name: timm, model: test_vit, image_size: 16, dim: 10}"
    assert call(make_run(timm), "onnx", tmp_path / "out").count("maximum difference") == 2

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("a data-dependent shape\nand much more")

    monkeypatch.setattr(torch.onnx, "export", refuse)
    with pytest.raises(UserError, match=r"backbone\.image \('timm'\) cannot be traced.*a data-dependent shape$"):
        call(make_run(timm), "onnx", tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "overrides",
    [
        ["backbone.image.activation=quick_gelu", "backbone.text.activation=quick_gelu"],
        ["backbone.image.pre_norm=false", "backbone.image.norm_eps=1e-3"],
        ["augment.image.size=24"],
        ["loss=[{name: siglip}]", "fusion=null", "teacher=null"],
    ],
)
def test_options_go_along(make_run: Callable[..., Path], tmp_path: Path, overrides: list[str]) -> None:
    """Export compares before it keeps anything: activation, LayerNorms, another picture size, and a bias."""
    pytest.importorskip("open_clip")
    assert call(make_run(*overrides), "open_clip", tmp_path / "out").count("maximum difference") == 2


@pytest.mark.parametrize(("to", "init"), [("open_clip", "open_clip"), ("hf", "hf_clip")])
def test_what_was_exported_starts_another_run(
    run: Path, tmp_path: Path, registry: Registry, to: str, init: str
) -> None:
    """Every tensor of both towers and the scale comes back; fusion is new, and the line says so."""
    pytest.importorskip("open_clip")
    pytest.importorskip("transformers")
    call(run, to, tmp_path / "out")
    other = objective(registry, seed=1)
    text = RECIPE + f"init: [{{name: {init}, source: '{tmp_path / 'out'}'}}]\n"
    node = parse_recipe(text, "r.yaml", registry=registry).init[0]
    loaded: Loaded = node.build().apply(other)
    state = torch.load(run / "checkpoints/step-00000007.pt", weights_only=True)["objective"]
    names = {n for n in state if n.startswith("backbone.")} | {"loss.contrastive.logit_scale"}
    assert loaded.names == names
    assert all(torch.equal(other.state_dict()[name], state[name]) for name in names)
    assert "new here: fusion.token_map, fusion.pooler, loss.cross_modal_distillation" in loaded.line


def test_the_card(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("open_clip")
    report: dict[str, Any] = {"scores": {"student/retrieval/M": 12.5, "teacher/retrieval/M": 99.0}, "split": "val"}
    (run / "report.json").write_text(json.dumps(report | {"steps": 9, "samples": 36}))
    call(run, "open_clip", tmp_path / "out", "--licence", "apache-2.0")
    text = (tmp_path / "out/README.md").read_text()
    head = yaml.safe_load(text.split("---")[1])
    assert head["license"] == "apache-2.0"
    assert "| retrieval M | 12.50 |" in text
    assert "99.00" not in text
    assert "after 9 steps (36 samples). **The exported step is 7.**" in text
    kept = yaml.safe_load(text.split("## Recipe\n\n```yaml\n")[1].split("```")[0])
    assert kept["backbone"]["image"]["mlp_ratio"] == 3.0


@pytest.mark.parametrize(
    ("overrides", "to", "message"),
    [
        (["backbone.image.class_tokens=2"], "open_clip", r"backbone\.image\.class_tokens is 2"),
        (["backbone.image.pre_norm=false"], "hf", r"backbone\.image\.pre_norm is false.*--to onnx"),
        (["backbone.image.activation=quick_gelu"], "open_clip", "one activation for both towers"),
        (
            ["backbone.text={name: bert_text, width: 16, layers: 1, heads: 2, dim: 10}"],
            "hf",
            "backbone.text 'bert_text'",
        ),
    ],
)
def test_what_a_layout_cannot_hold_is_named(
    make_run: Callable[..., Path], tmp_path: Path, overrides: list[str], to: str, message: str
) -> None:
    pytest.importorskip("open_clip")
    pytest.importorskip("transformers")
    with pytest.raises(UserError, match=message):
        call(make_run(*overrides), to, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_export_that_differs_is_not_kept(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The towers of the run are moved once they are written: what would be a bug in a layout."""
    pytest.importorskip("open_clip")
    whole = exporting.Subject.embed

    def moved(subject: Any, modality: str, items: list[Any]) -> Tensor:
        return whole(subject, modality, items) + (2e-5 if modality == "text" else 0)

    monkeypatch.setattr(exporting.Subject, "embed", moved)
    with pytest.raises(UserError, match=r"text embeddings differ by 2\.0e-05"):
        call(run, "open_clip", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_mistakes_are_one_line(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("x")
    with pytest.raises(UserError, match="exists, and is not overwritten"):
        call(run, "open_clip", tmp_path / "full")
    with pytest.raises(UserError, match="not a run folder"):
        call(tmp_path, "open_clip", tmp_path / "out")
    for to, module in (("open_clip", "open_clip"), ("hf", "transformers"), ("onnx", "onnxruntime")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            with pytest.raises(UserError, match=rf"pip install 'distill-framework\[{to}\]'"):
                call(run, to, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
