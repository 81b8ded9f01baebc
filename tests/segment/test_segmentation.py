"""The task: scores against scikit-learn's and by hand, windows, thresholds, what is refused."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from colours import COLOURS, SeesColours, painted, png, run, sample
from PIL import Image
from score_values import values
from sklearn.metrics import confusion_matrix, jaccard_score
from torch import Tensor
from torch.nn.functional import normalize

from distill_authoring.conformance import assert_conforms
from distill_core.batch import View
from distill_core.errors import DataError, RecipeErrors, UserError
from distill_core.evaluate.sets import EvaluationSet
from distill_core.plan import BackboneSpec, ModalityPlan, Plan
from distill_core.recipe.resolve import load_recipe
from distill_core.registry import Registry
from distill_core.system import distributed
from distill_segment.folders import ImageMaskFolder, SegmentationSet
from distill_segment.scores import confusion, scores_of
from distill_segment.segmenter import Segmenter
from distill_segment.task import Segmentation, SegmentationConfig
from distill_vl.example import model


@pytest.mark.slow
@pytest.mark.parametrize("component", [Segmentation, ImageMaskFolder, SegmentationSet])
def test_conforms(component: Any) -> None:
    assert_conforms(component)


def test_scores_by_hand() -> None:
    """Six pixels, one of them not scored; class 2 is nowhere, and so in no mean."""
    truth = torch.tensor([[0, 0, 1], [1, 1, 255]])
    found = torch.tensor([[0, 1, 1], [1, 0, 0]])
    matrix = confusion(truth, found, 3)
    assert matrix.tolist() == [[1, 1, 0, 0], [1, 2, 0, 0], [0, 0, 0, 0]]
    assert scores_of(matrix, ["cat", "dog", "cow"]) == pytest.approx(
        {
            "IoU/cat": 100 / 3,
            "IoU/dog": 50,
            "mIoU": 100 * 5 / 12,
            "pixel_accuracy": 60,
            "mean_accuracy": 100 * (1 / 2 + 2 / 3) / 2,
        }
    )


def test_scores_are_scikit_learns() -> None:
    """Fresh maps of 7 classes, two of which are never true, one neither true nor found; several pictures added up."""
    rng = np.random.default_rng(0)
    truths, founds, matrix = [], [], torch.zeros(7, 8, dtype=torch.long)
    for _ in range(3):
        truth, found = rng.integers(0, 5, (13, 17)), rng.integers(0, 6, (13, 17))
        truth[rng.random((13, 17)) < 0.1] = 255
        matrix += confusion(torch.from_numpy(truth), torch.from_numpy(found), 7)
        truths.append(truth[truth != 255])
        founds.append(found[truth != 255])
    a, b = np.concatenate(truths), np.concatenate(founds)
    assert matrix[:, :-1].numpy().tolist() == confusion_matrix(a, b, labels=range(7)).tolist()
    assert not matrix[:, -1].any()
    scores = scores_of(matrix, [str(i) for i in range(7)])
    assert scores["mIoU"] == pytest.approx(100 * jaccard_score(a, b, average="macro"))
    for i, value in enumerate(jaccard_score(a, b, average=None, labels=range(6))):
        assert scores[f"IoU/{i}"] == pytest.approx(100 * value)


def test_what_is_found_as_nothing_is_wrong() -> None:
    """Three of class 0, of which one was found as none (3); it is in no class's found pixels."""
    matrix = confusion(torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 3, 1]), 3)
    assert matrix.tolist() == [[2, 0, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0]]
    scores = scores_of(matrix, ["cat", "dog", "cow"])
    assert (scores["IoU/cat"], scores["IoU/dog"]) == pytest.approx((100 * 2 / 3, 100))
    assert (scores["pixel_accuracy"], scores["mean_accuracy"]) == pytest.approx((75, 100 * (2 / 3 + 1) / 2))


def test_a_picture_worked_out_by_hand(sees_colours: Any) -> None:
    """Squares of 6 px resized to 12: halves are found but for the borders, which the mask leaves out; a quarter of the
    mask is another class than the colour, so red is 1/2 right, blue never."""
    mask = np.full((12, 12), 255)
    mask[:5, :5], mask[7:, :5], mask[:, 7:] = 0, 2, 1
    picture = painted([["red", "green"], ["red", "green"]], 6)
    scores = run({}, sees_colours, sample(picture, mask))
    assert scores["set/IoU/red"] == pytest.approx(50)
    assert scores["set/IoU/green"] == pytest.approx(100)
    assert scores["set/IoU/blue"] == 0
    assert scores["mIoU"] == scores["set/mIoU"] == pytest.approx(50)
    assert scores["pixel_accuracy"] == pytest.approx(100 * (25 + 60) / (50 + 60))
    assert scores["set/pictures"] == 1


def test_words_templates_and_the_background(sees_colours: Any) -> None:
    """`lime, green` is one class; grey prompts find no colour; with a threshold what is unsure is class 0."""
    picture = painted([["red", "green"]], 12)
    mask = np.zeros((12, 24))
    mask[:, 12:] = 1
    found = Segmenter(sees_colours, SegmentationConfig(), [("red",), ("lime", "green"), ("blue",)])
    whole = found(Image.fromarray(np.full((12, 12, 3), COLOURS["green"], np.uint8)), 12, 12)
    assert whole.unique().tolist() == [1]
    classes = "background\nred\nblue\n"
    templates = {"templates": ["a {}", "{} paint"], "threshold": 0.9, "prompt_background": False}
    mask[:, :12], mask[:, 12:] = 1, 0  # green is neither red nor blue: cosine 0 with both, probability one half
    mask[:, 10:14] = 255
    scores = run(templates, sees_colours, sample(picture, mask, classes))
    assert scores["mIoU"] == 100
    with pytest.raises(ValueError, match="needs a `threshold`"):
        SegmentationConfig(prompt_background=False)


def test_templates_by_name_and_from_a_file(sees_colours: Any, tmp_path: Path) -> None:
    """The 7 and the 80 prompts of CLIP's authors, and a file's; a name that there is not is refused with the recipe."""
    seen: list[str] = []

    class Reads(SeesColours):
        def encode(self, modality: str, items: Iterable[str], *, features: str = "embedding") -> Tensor:
            seen.extend(items)
            return super().encode(modality, seen)

    Segmenter(Reads(), SegmentationConfig(templates="openai_simple"), [("red",)])  # type: ignore[arg-type]
    assert (len(seen), seen[0]) == (7, "itap of a red.")
    (tmp_path / "t.txt").write_text("one {c}\ntwo {}\n")
    here = sample(painted([["red", "green"]], 8), [[0] * 8 + [1] * 8] * 8)
    for templates in ("openai", str(tmp_path / "t.txt"), "some {}"):
        assert run({"templates": templates}, sees_colours, here)["mIoU"] > 50
    with pytest.raises(ValueError, match="no templates named 'opnai', did you mean 'openai'"):
        SegmentationConfig(templates="opnai")


def test_a_whole_run_is_scikit_learns_on_emoji_scenes(tmp_path: Path) -> None:
    """The composited scenes, a ViT that has learned nothing: the task's scores are scikit-learn's of its own maps."""
    from distill_emoji.scenes import EmojiScenes, ScenesConfig

    emoji = {"limit": 120, "shards": 1, "size": 16, "styles": ("openmoji",), "cache": str(tmp_path)}
    source = EmojiScenes(ScenesConfig.model_validate({"scenes": 4, "concepts": 5, "size": 32, "emoji": emoji}))
    source.prepare()
    samples = list(source.samples("validation")["openmoji"])
    small, config = model(), SegmentationConfig(attention="correlative")
    scores = values(Segmentation(config).run(small, [EvaluationSet("scenes", samples)]))
    assert scores["scenes/pictures"] == 4
    names = samples[0]["classes.txt"].decode().split("\n")
    segmenter = Segmenter(small, config, [(name,) for name in names])
    a, b = [], []
    for one in samples:
        (picture,) = small.augment["image"].decode(one)
        a.append(np.asarray(Image.open(io.BytesIO(one["mask.png"]))).ravel())
        b.append(segmenter(picture, 32, 32).numpy().ravel())
    labels = sorted(set(np.concatenate(a)) | set(np.concatenate(b)))
    each = jaccard_score(np.concatenate(a), np.concatenate(b), labels=labels, average=None)
    assert len(labels) > 2
    assert scores["mIoU"] == pytest.approx(100 * each.mean())
    for label, value in zip(labels, each, strict=True):
        assert scores[f"scenes/IoU/{names[label]}"] == pytest.approx(100 * value)


def test_ranks_share_the_pictures(monkeypatch: pytest.MonkeyPatch, sees_colours: Any) -> None:
    """What two ranks count adds up to what one does, and no picture is counted twice."""
    samples = [sample(painted([["red", "blue"]], 8), np.full((8, 16), i % 3), key=str(i)) for i in range(5)]
    task = Segmentation(SegmentationConfig())
    segmenter = Segmenter(sees_colours, task.config, [("red",), ("green",), ("blue",)])
    whole = task._share(segmenter, EvaluationSet("set", samples))
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    parts = []
    for rank in range(2):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        parts.append(task._share(segmenter, EvaluationSet("set", samples)))
    assert (parts[0][0] + parts[1][0]).tolist() == whole[0].tolist()
    assert [part[1] for part in parts] == [3, 2]


def test_ties_and_nan_count_against_the_model() -> None:
    """A mask that is three quarters class 0: would catch an argmax that takes the first of equals, or NaN."""

    class Broken(SeesColours):
        value = torch.nan

        def dense(self, modality: str, views: Sequence[View], *, attention: str = "plain") -> Tensor:
            return torch.full_like(super().dense(modality, views), self.value)

    class Collapsed(SeesColours):
        def encode(self, modality: str, items: Iterable[str], *, features: str = "embedding") -> Tensor:
            return normalize(torch.ones(len(list(items)), 3), dim=-1)

    mask = np.zeros((12, 12))
    mask[:6, :6] = 1
    here = sample(painted([["red", "green"], ["red", "red"]], 6), mask)
    tied, infinite = Broken(), Broken()
    tied.value, infinite.value = 0.5, torch.inf
    for broken in (Broken(), tied, infinite, Collapsed()):
        scores = run({}, broken, here)
        assert (scores["mIoU"], scores["pixel_accuracy"], scores["mean_accuracy"]) == (0, 0, 0)
    assert run({"threshold": 0.5}, Broken(), here)["mIoU"] == 0
    assert run({"threshold": 0.5}, tied, here)["mIoU"] == 37.5  # a third each: unsure, and so class 0
    task = Segmentation(SegmentationConfig())
    task.overlay(Segmenter(Broken(), task.config, task.classes(EvaluationSet("set", [here]))), here, "set")  # type: ignore[arg-type]


def test_one_list_of_classes_a_set(sees_colours: Any, tmp_path: Path) -> None:
    """Would catch the first sample's classes standing for all; a list of one's own does."""
    picture, mask = painted([["red"]], 8), np.zeros((8, 8))
    samples = [sample(picture, mask, "red\ngreen"), sample(picture, mask, "green\nred", key="two")]
    with pytest.raises(DataError, match=r"here: classes\.txt of 'two' is not that of the set's first sample"):
        run({}, sees_colours, *samples)
    assert run({}, sees_colours, samples[0], {**samples[0], "classes.txt": b"red\ngreen\n"})["mIoU"] == 100
    (tmp_path / "c.txt").write_text("red\ngreen\n")
    assert run({"classes": str(tmp_path / "c.txt")}, sees_colours, *samples)["mIoU"] == 100


def test_numbers_that_no_class_can_have(sees_colours: Any) -> None:
    """-1 in a TIFF of 32 bits, 256 in a PNG of 16."""
    picture = painted([["red"]], 8)
    good = sample(picture, np.zeros((8, 8)))
    files = []
    for pixels, kind in ((np.full((8, 8), -1, np.int32), "TIFF"), (np.full((8, 8), 256, np.uint16), "PNG")):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, kind)
        files.append({**good, "__key__": str(pixels[0, 0]), "mask.png": file.getvalue()})
    here = EvaluationSet("set", [good, *files])
    assert values(Segmentation(SegmentationConfig()).run(sees_colours, [here]))["set/pictures"] == 1
    assert {key: skipped.reason for (key, _), skipped in here.skipped.items()} == {
        value: f"image: the mask has the value {value}; class numbers are 0 to 254, and 255 is not scored"
        for value in ("-1", "256")
    }


def test_bad_samples_are_skipped_and_named(sees_colours: Any) -> None:
    picture = painted([["red"]], 8)
    good = sample(picture, np.zeros((8, 8)), key="good")
    bad = {
        "small": sample(picture, np.zeros((4, 4))),
        "coloured": {**good, "mask.png": png(np.zeros((8, 8, 3)))},
        "torn": {**good, "mask.png": b"no picture"},
        "bare": {k: v for k, v in good.items() if k != "mask.png"},
        "blind": {**good, "png": b"no picture"},
    }
    here = EvaluationSet("set", [good, *({**fields, "__key__": key} for key, fields in bad.items())])
    assert values(Segmentation(SegmentationConfig()).run(sees_colours, [here]))["set/pictures"] == 1
    said = {key: skipped.reason for (key, _), skipped in here.skipped.items()}
    assert said == {
        "small": "image: the mask is 4 x 4, the picture 8 x 8 pixels",
        "coloured": "image: the mask is RGB; its pixels must be class numbers (mode L, P or I)",
        "torn": "image: the mask is not a picture of a known format",
        "bare": "image: no mask: no field mask.png",
        "blind": "image: not a readable picture: of none of the formats jpeg, png, webp, gif, bmp (option `formats`)",
    }


def test_what_is_refused(sees_colours: Any, tmp_path: Path) -> None:
    picture = painted([["red"]], 8)
    with pytest.raises(DataError, match=r"here: the mask of 'one' has class 7; there are 3 classes\. Check"):
        run({}, sees_colours, sample(picture, np.full((8, 8), 7)))
    with pytest.raises(DataError, match="'set': no sample with a picture and a mask of some class"):
        run({}, sees_colours, sample(picture, np.full((8, 8), 255)))
    for data, said in {
        "cat\n\ndog\n": r"c\.txt:2: no class in this line",
        "cat\ncat, kitten\n": "two classes are called 'cat'",
        "\n": "0 classes",
    }.items():
        (tmp_path / "c.txt").write_text(data)
        with pytest.raises(DataError, match=said):
            run({"classes": str(tmp_path / "c.txt")}, sees_colours, sample(picture, np.zeros((8, 8))))
    with pytest.raises(DataError, match="no_file: the classes cannot be read"):
        run({"classes": "no_file"}, sees_colours, sample(picture, np.zeros((8, 8))))
    bare = {k: v for k, v in sample(picture, np.zeros((8, 8))).items() if k != "classes.txt"}
    with pytest.raises(DataError, match="give the task `classes: FILE`"):
        run({}, sees_colours, bare)
    with pytest.raises(UserError, match="stride 9, window 8, side 12: each is at most the next"):
        run({"stride": 9}, sees_colours, sample(picture, np.zeros((8, 8))))


def test_a_recipe_is_refused_before_data_are_touched(tiny_recipe: Path, registry: Registry) -> None:
    def said(task: str) -> str:
        with pytest.raises(RecipeErrors) as caught:
            load_recipe(tiny_recipe, registry=registry, overrides=[f"evaluate.tasks=[{task}]"])
        return str(caught.value)

    assert (
        "'segmentation': no attention 'corelative': the backbone of 'image' has plain, value, value_value, correlative"
        in (said("{name: segmentation, attention: corelative}"))
    )
    other_way = said("{name: segmentation, modalities: [text, image]}")
    assert "'segmentation' needs dense embeddings of 'text'; its backbone has no `dense`" in other_way
    alone = Plan({"image": ModalityPlan(("global",), BackboneSpec(8, 8, dense=("plain",)))})
    (line,) = Segmentation.problems(SegmentationConfig(), alone)
    assert line == "'segmentation' compares two modalities; the recipe has 'image' alone"
