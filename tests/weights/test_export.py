"""Exports, loaded as a user of the other library loads them, embed what the run embeds."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import normalize
from wrapping_losses import Mean

import distill_core
from distill_core import Head
from distill_core.contracts.weights import LoadReport
from distill_core.errors import UserError
from distill_core.recipe.build import build_objective
from distill_core.recipe.resolve import parse_recipe
from distill_core.registry import Entry, Registry
from distill_core.run.checkpoint import Checkpoints
from distill_core.run.folder import RunFolder
from distill_core.system.extras import install
from distill_vl.tokenizer import ClipTokenizer
from distill_weights.export import check_decoder
from distill_weights.formats import HfFormat, OnnxFormat, OpenClipFormat
from distill_weights.subject import Subject
from tests.weights.conftest import RECIPE, call, objective

pytestmark = pytest.mark.slow

TEXTS = ["a boat", "the quiet old river, and a house!", "red " * 100]


@pytest.fixture
def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(3)]


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
    own = torch.stack([ours.augment["image"].eval_view(p).data for p in pictures])
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
    pixels = torch.stack([ours.augment["image"].eval_view(p).data for p in pictures])
    ids = ours.collators["text"]([[ours.augment["text"].eval_view(t)] for t in TEXTS], [0] * 3).groups[0].x[0]
    for name, x, items in (("image", pixels, pictures), ("text", ids, TEXTS)):
        session = onnxruntime.InferenceSession(tmp_path / "out" / told[name]["file"])
        for some in (slice(0, 1), slice(0, 3)):
            (found,) = session.run(None, {told[name]["input"]: x[some].numpy()})
            close(torch.from_numpy(found), ours.encode(name, items[some]))
    short = ids[:1, : int(ids[0].argmax()) + 3]
    close(torch.from_numpy(session.run(None, {"text": short.numpy()})[0]), ours.encode("text", TEXTS[:1]))


ALONE = ["augment.text=null", "backbone.text=null", "fusion=null", "loss=[{name: dino}]"]


def test_what_no_loss_trained_is_not_exported_for_the_embedding(
    make_run: Callable[..., Path], tmp_path: Path, pictures: list[Image.Image]
) -> None:
    """DINO. Would catch a projection that stays as it was drawn, exported as the model's embedding."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    alone = make_run(*ALONE)
    said = call(alone, "onnx", tmp_path / "out")
    assert "image: no loss of the run trains its embedding, so its class tokens are exported" in said
    model = distill_core.load(str(alone))
    views = torch.stack([model.augment["image"].eval_view(picture).data for picture in pictures])
    (found,) = onnxruntime.InferenceSession(tmp_path / "out" / "image.onnx").run(None, {"image": views.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model.encode("image", pictures, features="class_token"))
    both = make_run("fusion=null", "loss=[{name: dino}]")
    assert (
        call(both, "open_clip", tmp_path / "clip").count("the exported projection has its initial weights") == 2  # both
    )


def test_onnx_takes_other_towers(
    make_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is no CLIP; a tower that cannot be traced is named."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("timm")
    timm = "backbone.image={name: timm, model: test_vit, image_size: 16, dim: 10}"
    assert (
        call(make_run(timm, "augment.image.local_size=16"), "onnx", tmp_path / "out").count("maximum difference") == 2
    )

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("a data-dependent shape\nand much more")

    monkeypatch.setattr(torch.onnx, "export", refuse)
    with pytest.raises(UserError, match=r"backbone\.image \('timm'\) cannot be traced.*a data-dependent shape$"):
        call(make_run(timm, "augment.image.local_size=16"), "onnx", tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("to", "overrides"),
    [
        ("open_clip", ["backbone.image.activation=quick_gelu", "backbone.text.activation=quick_gelu"]),
        ("hf", ["backbone.image.activation=quick_gelu"]),
        ("open_clip", ["backbone.image.pre_norm=false", "backbone.image.norm_eps=1e-3"]),
        ("hf", ["backbone.image.norm_eps=1e-3"]),
        ("open_clip", ["augment.image.size=24"]),
        ("hf", ["augment.image.size=24"]),
    ],
)
def test_options_go_along(make_run: Callable[..., Path], tmp_path: Path, to: str, overrides: list[str]) -> None:
    """Export compares before it keeps anything: activation, LayerNorms, another picture size."""
    pytest.importorskip("open_clip")
    pytest.importorskip("transformers")
    assert call(make_run(*overrides), to, tmp_path / "out").count("maximum difference") == 2


@pytest.mark.parametrize("to", ["open_clip", "hf", "onnx"])
def test_scale_and_bias_go_along(make_run: Callable[..., Path], tmp_path: Path, to: str) -> None:
    """Embeddings do not show them: held against the checkpoint. What has no place for the bias says so."""
    for module in ("open_clip", "transformers", "onnxscript"):
        pytest.importorskip(module)
    run = make_run("loss=[{name: siglip}]", "fusion=null", "teacher=null")
    printed = call(run, to, tmp_path / "out")
    state = torch.load(run / "checkpoints/step-00000007.pt", weights_only=True)["objective"]
    learned = {name: float(state[f"loss.siglip.{name}"]) for name in ("logit_scale", "logit_bias")}
    assert learned["logit_bias"] != -10, "the first value: nothing was tested"
    if to == "onnx":
        found = json.loads((tmp_path / "out/preprocess.json").read_text())
        assert {name: found[name] for name in learned} == pytest.approx(learned)
        return
    model = load(to, tmp_path / "out")
    assert float(model.logit_scale) == pytest.approx(learned["logit_scale"])
    if to == "hf":
        assert "CLIPModel has no bias: the run's logit_bias is left out" in printed
    else:
        assert float(model.logit_bias) == pytest.approx(learned["logit_bias"])


def load(to: str, folder: Path) -> Any:
    """The model of an export, as a user loads it."""
    if to == "hf":
        return pytest.importorskip("transformers").CLIPModel.from_pretrained(folder).requires_grad_(False)
    open_clip = pytest.importorskip("open_clip")
    return open_clip.create_model_and_transforms(f"local-dir:{folder}")[0].requires_grad_(False)


REVERSED = "loss=[{name: cross_modal_distillation}, {name: contrastive}]"


def test_the_scale_is_that_of_the_towers_own_embeddings(
    make_run: Callable[..., Path], tmp_path: Path, registry: Registry
) -> None:
    """Whatever the order of the losses: the distillation's scale is over fused embeddings, out as well as in."""
    pytest.importorskip("open_clip")
    run = make_run(REVERSED)
    call(run, "open_clip", tmp_path / "out")
    state = torch.load(run / "checkpoints/step-00000007.pt", weights_only=True)["objective"]
    own = float(state["loss.contrastive.logit_scale"])
    assert own != pytest.approx(float(state["loss.cross_modal_distillation.logit_scale"]), abs=1e-3)
    assert float(load("open_clip", tmp_path / "out").logit_scale) == pytest.approx(own)
    other = objective(registry, REVERSED, seed=1)
    cls = registry.get("weights", "open_clip").cls
    loaded: LoadReport = cls(cls.Config(source=str(tmp_path / "out"))).apply(other)
    assert {name for name in loaded.names if "logit" in name} == {"loss.contrastive.logit_scale"}
    assert float(other.loss["contrastive"].get_parameter("logit_scale")) == pytest.approx(own)


def test_the_scale_of_a_loss_inside_another_goes_along(
    run: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches CLIP's first scale in the place of one that was learned."""
    mine = Registry([*registry.entries.values(), Entry(Mean, "mine", "mine")])
    monkeypatch.setattr(Registry, "discover", lambda: mine)
    options = "loss=[{name: mean_of, of: [cross_modal_distillation], more: {third: contrastive}}]"
    recipe = parse_recipe(RECIPE, "r.yaml", registry=mine, overrides=[options])
    folder = RunFolder.create(run.parent / "nested", recipe)
    state = objective(mine, options).state_dict()
    Checkpoints(folder.path).save(7, {"objective": state})
    scales = Subject.load(folder.path, teacher=False, checkpoint="last").scales
    assert scales == {"logit_scale": state["loss.mean_of.more.third.logit_scale"]}


def test_a_run_that_ended_in_a_stage(run: Path, registry: Registry) -> None:
    """Catches an export with the recipe's first losses, heads and options, which the checkpoint no longer has."""
    stages = "stages=[{at: 0.5, set: {loss: [siglip], fusion: null, teacher: null}}]"
    recipe = parse_recipe(RECIPE, "r.yaml", registry=registry, overrides=[stages])
    folder = RunFolder.create(run.parent / "staged", recipe)
    state = build_objective(recipe.of_stage(1)).state_dict()
    Checkpoints(folder.path).save(7, {"objective": state, "stage": 1})
    subject = Subject.load(folder.path, teacher=False, checkpoint="last")
    assert subject.left_out == {}
    assert subject.scales.keys() == {"logit_scale", "logit_bias"}


def test_heads_are_left_out_and_named(make_run: Callable[..., Path], tmp_path: Path) -> None:
    """Would catch a decoder that an export loses without a word, and one that it stumbles over."""
    pytest.importorskip("open_clip")
    decoder = "heads={writer: {name: caption_decoder, width: 16, layers: 1, heads: 2}}"
    losses = "loss=[{name: siglip}, {name: captioning, head: writer}]"
    printed = call(make_run(losses, decoder, "fusion=null", "teacher=null"), "open_clip", tmp_path / "out")
    assert "left out: heads.writer (caption_decoder)" in printed
    assert printed.count("maximum difference") == 2


CAPTIONING = ["loss=[{name: siglip}, {name: captioning, head: writer}]", "fusion=null"]
DECODERS = {
    "caption": ("image", ["heads.writer={name: caption_decoder, width: 16, layers: 2, heads: 2}"]),
    "coca": (
        "image",
        [
            "heads.writer={name: coca_decoder, layers: 2, heads: 2, queries: 3}",
            "backbone.image.pooling=attention",
            "backbone.text.padding=longest",
        ],
    ),
    "of_another_text": (  # with a mask, and of any length
        "note",
        [
            "heads.writer={name: prefix_decoder, image: note, width: 16, layers: 2, heads: 2}",
            "augment.note={name: text_crop}",
            "backbone.note={name: clip_text, width: 8, layers: 1, heads: 2, dim: 10, padding: longest}",
        ],
    ),
}


@pytest.mark.parametrize(("about", "overrides"), DECODERS.values(), ids=[*DECODERS])
def test_onnx_writes_captions(
    make_run: Callable[..., Path], tmp_path: Path, pictures: list[Image.Image], about: str, overrides: list[str]
) -> None:
    """Greedily, by the files alone and what preprocess.json says of them, as the model does. Would catch tokens other
    than those that the decoder was trained on, a mask that is lost, and a batch or a length traced as a constant."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    source, out = make_run(*CAPTIONING, *overrides), tmp_path / "out"
    printed = call(source, "onnx", out)
    assert "heads.writer: maximum difference" in printed
    assert "left out" not in printed
    files = json.loads((out / "preprocess.json").read_text())
    decoder = files["heads.writer"]
    names = ["text", about, "heads.writer"]
    sessions = {name: onnxruntime.InferenceSession(out / files[name]["file"]) for name in names}

    def run(name: str, inputs: dict[str, Any]) -> dict[str, Any]:
        outputs = [output.name for output in sessions[name].get_outputs()]
        return dict(zip(outputs, sessions[name].run(None, inputs), strict=True))

    model = distill_core.load(source)
    items = pictures if about == "image" else TEXTS
    for some in (items, items[:1]):
        views = [[model.augment[about].eval_view(item)] for item in some]
        seen = run(about, {about: model.collators[about](views, [0] * len(some)).groups[0].x[0].numpy()})
        ids = np.full((len(some), 1), decoder["start"])
        for _ in range(6):
            known = seen | {"ids": ids} | (run("text", {"text": ids}) if "text_tokens" in decoder["inputs"] else {})
            logits = run("heads.writer", {name: known[name] for name in decoder["inputs"]})["logits"]
            assert logits.shape[:2] == ids.shape
            ids = np.concatenate([ids, logits[:, -1].argmax(-1)[:, None]], 1)
        assert decoder["end"] not in ids, "it ended early: the model has stopped there"
        assert ClipTokenizer(77).texts(torch.from_numpy(ids)) == model.generate(about, some, longest=7)


def test_decoders_of_the_side_alone_are_exported(make_run: Callable[..., Path]) -> None:
    """What this side has no copy of, and a head that is no decoder, stay left out."""
    pytest.importorskip("onnxscript")
    run = make_run(*CAPTIONING, *DECODERS["caption"][1])
    for teacher, names in ((False, ["writer"]), (True, [])):
        subject = Subject.load(run, teacher=teacher, checkpoint="last")
        subject.model.heads["shared"] = NoDecoder(None, None)  # type: ignore[arg-type]
        subject.left_out["heads.shared"] = "no_decoder"
        assert [*OnnxFormat(subject).decoders()] == names
        assert [*subject.left_out] == ["heads.writer", "heads.shared"][len(names) :]


class NoDecoder(Head):
    name = "no_decoder"

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_logits_that_differ_are_seen(make_run: Callable[..., Path]) -> None:
    """In any sample that has an id after it, in any batch; but not what follows the end."""
    pytest.importorskip("onnxscript")
    subject = Subject.load(make_run(*CAPTIONING, *DECODERS["caption"][1]), teacher=False, checkpoint="last")
    form, decoder = OnnxFormat(subject), subject.decoders()["writer"]

    def difference(batch: int, length: int, ended: bool) -> float:
        def decode(items: Any) -> Tensor:
            logits = subject.logits(decoder, items).clone()
            if len(items["text"]) == batch and logits.shape[1] >= length:
                end = subject.inputs("text", items["text"])[-1].argmax()
                logits[-1, end if ended else end - 1, 5] += 1
            return logits

        return check_decoder(form, "writer", decode).difference

    assert difference(9, 0, False) == 0  # no such batch
    assert difference(5, 0, True) == 0
    for batch, length in ((5, 0), (3, 0), (1, 77)):
        assert difference(batch, length, False) > 1e-3


def test_a_bias_that_no_loss_has_is_named(make_run: Callable[..., Path], tmp_path: Path, registry: Registry) -> None:
    pytest.importorskip("open_clip")
    call(make_run("loss=[{name: siglip}]", "fusion=null", "teacher=null"), "open_clip", tmp_path / "out")
    cls = registry.get("weights", "open_clip").cls
    loaded: LoadReport = cls(cls.Config(source=str(tmp_path / "out"))).apply(objective(registry))
    assert "left out, as no loss over the towers' own embeddings has one: logit_bias" in loaded.line


@pytest.mark.parametrize(("to", "weights"), [("open_clip", "open_clip"), ("hf", "hf_clip")])
def test_what_was_exported_starts_another_run(
    run: Path, tmp_path: Path, registry: Registry, to: str, weights: str
) -> None:
    """Every tensor of both towers and the scale comes back; fusion is new, and the line says so."""
    pytest.importorskip("open_clip")
    pytest.importorskip("transformers")
    call(run, to, tmp_path / "out")
    other = objective(registry, seed=1)
    text = RECIPE + f"weights: [{{name: {weights}, source: '{tmp_path / 'out'}'}}]\n"
    node = parse_recipe(text, "r.yaml", registry=registry).weights[0]
    loaded: LoadReport = node.build().apply(other)
    state = torch.load(run / "checkpoints/step-00000007.pt", weights_only=True)["objective"]
    names = {n for n in state if n.startswith("backbone.")} | {"loss.contrastive.logit_scale"}
    assert loaded.names == names
    assert all(torch.equal(other.state_dict()[name], state[name]) for name in names)
    assert "initialised anew: fusion.token_map, fusion.pooler, loss.cross_modal_distillation" in loaded.line


@pytest.mark.parametrize(
    ("overrides", "to", "message"),
    [
        (["backbone.image.class_tokens=2"], "open_clip", r"backbone\.image\.class_tokens is 2"),
        (["backbone.image.pooling=attention"], "hf", r"backbone\.image\.pooling is attention; CLIP has a class token"),
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
    """A weight is moved once it is written: what would be a bug in a layout."""
    pytest.importorskip("open_clip")
    write = OpenClipFormat.write

    def moved(form: OpenClipFormat, folder: Path) -> None:
        write(form, folder)
        state = load_file(folder / "open_clip_model.safetensors")
        state["text_projection"][0, 0] += 1e-2
        save_file(state, folder / "open_clip_model.safetensors")

    monkeypatch.setattr(OpenClipFormat, "write", moved)
    with pytest.raises(UserError, match="text embeddings differ by "):
        call(run, "open_clip", tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("processor_config.json", '"do_normalize": true', '"do_normalize": false', "image: the written preprocessing"),
        (
            "tokenizer_config.json",
            '"model_max_length": 77',
            '"model_max_length": 50',
            "text: the written tokenizer gives other ids",
        ),
    ],
)
def test_preprocessing_that_differs_is_not_kept(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, old: str, new: str, message: str
) -> None:
    """Weights alone are not what a user loads: pixels and ids of the other library are held against the run's."""
    pytest.importorskip("transformers")
    write = HfFormat.write

    def other(form: HfFormat, folder: Path) -> None:
        write(form, folder)
        text = (folder / file).read_text()
        assert old in text
        (folder / file).write_text(text.replace(old, new))

    monkeypatch.setattr(HfFormat, "write", other)
    with pytest.raises(UserError, match=message):
        call(run, "hf", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_texts_of_a_fixed_length_are_refused(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The length of a text is said to be dynamic: a file that takes the traced length alone is not kept."""
    pytest.importorskip("onnxscript")
    traced = torch.onnx.export

    def fixed(*arguments: Any, dynamic_shapes: Any, **options: Any) -> None:
        shapes = tuple({0: sizes[0]} for sizes in dynamic_shapes)
        traced(*arguments, dynamic_shapes=shapes, **options)

    monkeypatch.setattr(torch.onnx, "export", fixed)
    with pytest.raises(UserError, match=r"text\.onnx does not run on \[1, "):
        call(run, "onnx", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_run_is_read_once(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint of some gigabytes takes its time."""
    pytest.importorskip("open_clip")
    read: list[Path] = []
    load, text = torch.load, Path.read_text

    def loading(file: Any, *arguments: Any, **options: Any) -> Any:
        read.append(Path(file.name))
        return load(file, *arguments, **options)

    def reading(path: Path, *arguments: Any, **options: Any) -> str:
        read.append(path)
        return text(path, *arguments, **options)

    monkeypatch.setattr(torch, "load", loading)
    monkeypatch.setattr(Path, "read_text", reading)
    call(run, "open_clip", tmp_path / "out")
    inside = sorted(str(path.relative_to(run)) for path in read if path.is_relative_to(run))
    assert inside == ["checkpoints/step-00000007.pt", "recipe.yaml"]


def test_out_is_where_the_user_stands(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("open_clip")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert call(run, "open_clip", Path()).startswith(".: open_clip, ")
    assert (tmp_path / "here/open_clip_model.safetensors").is_file()


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
            with pytest.raises(UserError, match=re.escape(install(to.replace("_", "-")))):
                call(run, to, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
