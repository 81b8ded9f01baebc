"""`distill attend` and the attention maps of an evaluation: what is drawn, written and refused."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import distill_core
from distill_core.batch import View
from distill_core.cli import main
from distill_core.data.shard import Shards
from distill_core.data.tar_shards import TarShard
from distill_core.errors import DataError, UserError
from distill_core.evaluate.run import evaluate
from distill_core.evaluate.sets import EvaluationSet
from distill_core.recipe.build import build_objective, models_of
from distill_core.recipe.resolve import load_recipe
from distill_core.registry import Registry
from distill_core.run.folder import RunFolder
from distill_core.train import Trainer
from distill_explore.attention import ViewedItem, cross, entropy, readings, see
from distill_explore.drawing import Map, rows_of
from distill_explore.maps import AttentionMaps, AttentionMapsConfig
from distill_explore.page import text as html_of


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, registry: Registry, write_shards: Any, recipe_text: str) -> Path:
    """Runs of one step: `cosmos`, and `plain`, CLIP's objective without a fusion."""
    folder = tmp_path_factory.mktemp("attend")
    for prefix in ("train", "validation", "test"):
        write_shards(folder / "shards", 1, 6, prefix=prefix)
    (folder / "r.yaml").write_text(recipe_text.format(folder=folder / "shards"))
    changes = {"cosmos": [], "plain": ["fusion=null", "teacher=null", "loss.1=null"]}
    for name, change in changes.items():
        overrides = [f"name={name}", "train.steps=1", "evaluate.tasks=[]", *change]
        recipe = load_recipe(folder / "r.yaml", registry=registry, overrides=overrides)
        Trainer(recipe, RunFolder.create(folder / "runs", recipe), quiet=True).run()
    return folder / "runs"


@pytest.fixture(scope="module")
def picture(runs: Path) -> Path:
    path = runs.parent / "p.png"
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """`distill ARGUMENTS` -> exit code, standard output and error."""

    def command(*arguments: object) -> tuple[int, str, str]:
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as end:
            return (int(end.code or 0), *capsys.readouterr())
        return (0, *capsys.readouterr())

    return command


class Page(HTMLParser):
    """What a browser makes of it: tags with their attributes, and the words between them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.mark.slow
def test_attend_writes_what_the_model_computes(runs: Path, picture: Path, call: Call, tmp_path: Path) -> None:
    """Weights of the JSON against the fusion asked here. Would catch another view, tower, direction or mask."""
    text = "a red bird by the sea. two old boats"
    arguments = ("attend", runs / "cosmos", "--image", picture, "--text", text, "--text", "tree")
    code, out, err = call(*arguments, "--json", "--out", tmp_path / "deep" / "a.png")
    assert (code, err) == (0, "")
    answer = json.loads(out)
    assert answer["files"] == [str(tmp_path / "deep" / f"a.{end}") for end in ("png", "html")]
    model = distill_core.load(runs / "cosmos")
    assert model.fusion is not None
    views = {
        m: [[model.augment[m].eval_view(x)] for x in xs] for m, xs in (("image", [str(picture)]), ("text", [text]))
    }
    features = {m: model.features(m, v, tokens_of=(0,)) for m, v in views.items()}
    image, words = features["image"], features["text"]
    expected = {
        ("text", "image"): model.fusion.attention("image", words.pooled, image.tokens[0]),
        ("image", "text"): model.fusion.attention("text", image.pooled, words.tokens[0], words.masks[0]),
    }
    found = {(one["asking"], one["query"], one["answer"], one["item"]): one for one in answer["readings"]}
    for (asking, read), weights in expected.items():
        one = found[asking, text if asking == "text" else None, read, text if read == "text" else None]
        assert weights is not None
        torch.testing.assert_close(torch.tensor(one["weights"]), weights[0, 0], atol=1e-5, rtol=0)
        assert one["entropy"] == pytest.approx(entropy(weights).mean().item(), abs=1e-3)
    asked = [one["query"] for one in answer["readings"] if one["answer"] == "image" and one["asking"]]
    assert asked == [text, "tree", "a red bird by the sea", "two old boats"], "a text's sentences ask as well"
    (grid,) = {tuple(one["tokens"]) for one in answer["readings"] if one["answer"] == "image"}
    assert grid == (2, 2)
    pieces = [one["tokens"] for one in answer["readings"] if one["asking"] is None and one["answer"] == "text"]
    assert ["".join(piece) for piece in pieces] == [
        "<start> a red bird by the sea . two old boats <end> ",
        "<start> tree <end> ",
    ]
    assert all(
        len(one["weights"][0]) == np.prod(one["tokens"]) for one in answer["readings"] if one["answer"] == "image"
    )


@pytest.mark.slow
def test_the_page_is_whole_and_escapes_the_text(runs: Path, picture: Path, call: Call, tmp_path: Path) -> None:
    """Would catch words that become tags, a link to something outside, a script, and a head that is not shown."""
    text = '<script>alert(1)</script> & "a" <img src=x onerror=y>'
    code, out, _ = call(
        "attend", runs / "cosmos", "--image", picture, "--text", text, "--heads", "--out", tmp_path / "a"
    )
    assert code == 0
    page = Page((tmp_path / "a.html").read_text(encoding="utf-8"))
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "iframe", "object", "a"}
    sources = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert sources
    for source in sources:
        assert source is not None
        kind, _, data = source.partition(",")
        assert kind == "data:image/png;base64"
        Image.open(io.BytesIO(base64.b64decode(data))).verify()
    assert text in page.words
    assert all(not name.startswith("on") for _, attributes in page.tags for name in attributes)
    told = [attributes["title"] for tag, attributes in page.tags if tag == "span"]
    weights = [float(re.split(",", title or "")[0]) for title in told]
    # a strip each: the mean and two heads, of the picture's reading and of the text's own
    assert sum(weights) == pytest.approx(6, abs=0.02)
    captions = " ".join(page.words)
    assert captions.count("head 2:") == 4, "text reads image, image reads text, and both self-attentions"
    assert out.count("an even share  head 2\n") == 4
    with Image.open(tmp_path / "a.png") as figure:
        assert figure.format == "PNG"
        assert figure.width > 700


def test_tokens_of_any_tower_are_escaped() -> None:
    """CLIP's tokenizer parts `<b>` into harmless pieces; another tower's need not."""
    seen = ViewedItem("m", "x", ["<b>", "&amp; ", 'a"b '], torch.zeros(2), None, torch.ones(3, dtype=torch.bool), None)
    one = Map("", seen, torch.tensor([0.5, 0.25, 0.25]))
    page = Page(html_of(one))
    assert [tag for tag, _ in page.tags] == ["div", "span", "span", "span"]
    assert page.words == ["<b>", "&amp;", " ", 'a"b', " "]
    assert [attributes.get("title") for _, attributes in page.tags[1:3]] == [
        "0.5000, 1.50x",
        "0.2500, 0.75x",
    ]


@pytest.mark.slow
def test_what_cannot_be_told_is_left_out_and_said(runs: Path, picture: Path, call: Call, tmp_path: Path) -> None:
    for extra, why in (
        ((runs / "plain",), "the run has no fusion"),
        ((runs / "cosmos", "--teacher"), "a teacher has no"),
    ):
        both = ("--image", picture, "--text", "a tree", "--out", tmp_path / "a")
        code, out, err = call("attend", *extra, *both)
        assert code == 0
        assert f"note: no cross-attention: {why}" in err
        assert "self-attention" in out
        assert "reads" not in out
    code, out, err = call("attend", runs / "cosmos", "--image", picture, "--out", tmp_path / "b")
    assert (code, err) == (0, "")
    assert "principal components" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("cosmos",), "give --image FILE, --text WORDS, or both"),
        (("cosmos", "--image", "nowhere.png"), "--image nowhere.png: not a readable picture"),
        (("cosmos", "--image", "NOTES"), "not a readable picture: of none of the formats jpeg, png, webp"),
        (("missing", "--text", "x"), "no such run folder"),
        (("plain", "--text", "x", "--teacher"), "trained no teacher"),
        (("cosmos", "--text", "x", "--out", "NOTES/a"), "is no folder"),
        (("cosmos", "--text", "x", "--checkpoint", "77"), "77"),
    ],
)
def test_mistakes(
    runs: Path, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], said: str
) -> None:
    """One line, exit code 2, and nothing written."""
    monkeypatch.chdir(tmp_path)
    notes = runs.parent / "notes.txt"
    notes.write_text("no picture")
    run, *rest = (argument.replace("NOTES", str(notes)) for argument in arguments)
    code, out, err = call("attend", runs / run, *rest)
    assert (code, out) == (2, "")
    assert said in err
    assert len(err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_padding_has_no_weight_and_no_place(runs: Path) -> None:
    """A short text beside a long one is read as alone."""
    model = distill_core.load(runs / "cosmos")
    image = see(model, "image", [View(torch.randn(3, 16, 16))])
    short, _ = see(model, "text", [View("a boat"), View("a red bird by the old quiet river")])
    (alone,) = see(model, "text", [View("a boat")])
    assert len(short.mask) > len(alone.mask)
    for one, other in zip(readings(model, [*image, short]), readings(model, [*image, alone]), strict=True):
        assert one.weights.shape == other.weights.shape
        torch.testing.assert_close(one.weights, other.weights, atol=1e-5, rtol=0)
    assert cross(model, image, [short])[0].weights.shape[1] == 4


def test_scores_and_media_while_evaluating(runs: Path, registry: Registry) -> None:
    """Student and teacher: the teacher has no cross-attention and fails nothing. Entropies against the readings."""
    recipe = load_recipe(
        runs / "cosmos" / "recipe.yaml",
        registry=registry,
        overrides=["evaluate.tasks=[{name: attention_maps, samples: 3}]"],
    )
    source = recipe.data.source.build()
    models = {side: distill_core.load(runs / "cosmos", teacher=side == "teacher") for side in ("student", "teacher")}
    found = evaluate(recipe, models, source, "validation", media=2)
    assert found.failed == []
    assert found.no_media is None
    own = {f"{m}/class_entropy" for m in ("image", "text")}
    both = {f"{a}_to_{b}/entropy" for a, b in (("image", "text"), ("text", "image"))}
    (name,) = source.sets("validation")
    for side, expected in (("student", own | both), ("teacher", own)):
        scores = {k.removeprefix(f"{side}/attention_maps/") for k in found.values if k.startswith(side)}
        assert scores == {f"{name}/{score}" for score in expected}
    student, items = models["student"], []
    for sample in list(source.sets("validation")[name][0])[:3]:
        items.append(
            [View(student.augment[m].eval_view(student.augment[m].decode(sample)[0]).data) for m in ("image", "text")]
        )
    values = []
    for image, text in items:
        (a,), (b,) = see(student, "image", [image]), see(student, "text", [text])
        values.append(cross(student, [b], [a])[0].entropy)
    assert found.values[f"student/attention_maps/{name}/text_to_image/entropy"] == pytest.approx(
        np.mean(values), abs=1e-5
    )
    assert [(one.name, one.context["model"]) for one in found.media] == [
        ("attention_maps/maps", side) for side in ("student", "student", "teacher", "teacher")
    ]
    assert all(one.caption.startswith("validation-0-") for one in found.media)  # type: ignore[union-attr]
    with pytest.raises(DataError, match="no sample"):
        AttentionMaps(AttentionMapsConfig()).run(student, [EvaluationSet("none", [])])


class Silent(torch.nn.Module):
    """A fusion without the method `attention`, but with a submodule of that name."""

    name = "silent"

    def __init__(self) -> None:
        super().__init__()
        self.attention = torch.nn.Identity()


def test_a_silent_model_is_told_so(runs: Path, registry: Registry) -> None:
    model, teacher = distill_core.load(runs / "cosmos"), distill_core.load(runs / "cosmos", teacher=True)
    model.fusion = Silent()  # type: ignore[assignment]
    for backbone in (*model.backbone.values(), *teacher.backbone.values()):
        backbone.__class__ = type("Silent", (type(backbone),), {"class_attention": None})
    with pytest.raises(UserError, match="the backbone 'clip_text' of 'text' has no `class_attention`"):
        model.class_attention("text", [View("a tree")])
    shards = Shards([TarShard(runs.parent / "shards" / "validation-000.tar")])
    with pytest.raises(UserError, match="no backbone has a `class_attention`, and the fusion 'silent' no `attention`"):
        AttentionMaps(AttentionMapsConfig()).run(model, [EvaluationSet("v", shards)])
    model.fusion = None
    with pytest.raises(UserError, match="no backbone has a `class_attention`, and there is no fusion"):
        AttentionMaps(AttentionMapsConfig()).run(model, [EvaluationSet("v", shards)])
    scores = AttentionMaps(AttentionMapsConfig()).run(teacher, [EvaluationSet("v", shards)])
    assert scores == [], "the student's fusion may tell what a teacher has not"
    seen = see(model, "text", [View("a tree")])
    assert rows_of(readings(model, seen), seen) == []


def test_a_fusion_is_asked_for_its_own_modalities_alone(runs: Path, registry: Registry) -> None:
    """A third modality of the same width has tokens that could be read, but never are in training."""
    recipe = load_recipe(runs / "cosmos" / "recipe.yaml", registry=registry)
    text = {
        part: json.dumps(options["text"])
        for part, options in recipe.to_dict().items()
        if part in ("augment", "backbone")
    }
    overrides = [f"{part}.sound={options}" for part, options in text.items()]
    recipe = load_recipe(runs / "cosmos" / "recipe.yaml", registry=registry, overrides=overrides)
    model = models_of(recipe, build_objective(recipe), torch.device("cpu"))["student"]
    seen = [*see(model, "image", [View(torch.randn(3, 16, 16))])]
    seen += [one for m in ("text", "sound") for one in see(model, m, [View("a red bird")])]
    asked = {(one.reader.modality, one.answer.modality) for one in readings(model, seen) if one.reader}
    assert asked == {("image", "text"), ("text", "image")}
    assert cross(model, [seen[2]], [seen[0]]) == []


def test_the_picture_is_not_replaced(picture: Path, runs: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--image p.png --out p` writes p.png; also by another way to the same file."""
    before = picture.read_bytes()
    monkeypatch.chdir(picture.parent)
    for image in ("p.png", picture):
        code, _, err = call("attend", runs / "cosmos", "--image", image, "--out", "p")
        assert code == 2
        assert "p.png is the image itself; choose another name" in err
    assert picture.read_bytes() == before


@pytest.mark.parametrize(
    ("fusion", "told"),
    [
        ("{name: cross_attention, heads: 2, mask_padding: false}", {"image": 2, "text": 2}),
        ("{name: gated, heads: 4}", {"image": 4, "text": 4}),
        ("{name: q_former, heads: 2}", {"image": 2, "text": 2}),
        ("{name: text_conditioned_pool, heads: 2}", {"image": 2, "text": 2}),
        ("mean_pooling", {}),
        ("identity", {}),
    ],
)
def test_every_fusion_is_asked(fusion: str, told: dict[str, int], runs: Path, registry: Registry) -> None:
    """What is read, by how many heads. Would catch a fusion that draws nothing, or fails where it cannot tell."""
    path = runs / "cosmos" / "recipe.yaml"
    recipe = load_recipe(path, registry=registry, overrides=[f"fusion={fusion}", "backbone.text.padding=context"])
    model = models_of(recipe, build_objective(recipe), torch.device("cpu"))["student"]
    seen = see(model, "image", [View(torch.randn(3, 16, 16))]) + see(model, "text", [View("a red bird")])
    found = readings(model, seen)
    assert {one.answer.modality: len(one.weights) for one in found if one.reader} == told
    for one in found:
        assert one.weights.shape[1] == (4 if one.answer.modality == "image" else 5), "real tokens alone"
        assert (one.weights.sum(-1) < 1 + 1e-5).all()
    assert len(rows_of(found, seen)) == len(told) + 3
