"""Crops of regions and their sentences: what is read, where the crops lie, what is refused, and the loss of the pairs.
Pictures and sentences of icon scenes: tests/icons/test_region_crops.py."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import cross_entropy, normalize

from distill_core import BackboneSpec, BadSample, Features, ModalityPlan, Outputs, Plan, Progress, Sample, View
from distill_core.data.batches import SampleViews
from distill_core.errors import RecipeErrors
from distill_core.recipe.resolve import load_recipe
from distill_core.registry import Registry
from distill_core.tools import example_batch
from distill_vl.contrastive import PairedConfig, PairedContrastive
from distill_vl.region_crops import RegionCropsConfig, around, regions_of

SIZE = (200, 100)
SKY = {"box": [0.0, 0.0, 1.0, 0.25], "text": "a blue sky."}
BOAT = {"box": [0.25, 0.5, 0.5, 0.75], "text": "an old boat"}
GRIT = {
    "caption": "A dog in a field of flowers",
    "noun_chunks": [[0, 5, 0.1, 0.2, 0.5, 0.6, 0.9], [9, 16, 0, 0, 1, 1, 0.7]],
    "ref_exps": [[0.0, 27.0, 0.1, 0.2, 0.5, 0.6, 0.9]],
}


def sample(document: Any, key: str = "a", **fields: bytes) -> Sample:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (100, 200, 3), dtype=np.uint8)).save(file, "PNG")
    known = {"json": json.dumps(document).encode(), "txt": b"one. two", "png": file.getvalue()}
    return {"__key__": key, "__url__": "s.tar", **known, **fields}


def read(document: Any, **options: Any) -> list[tuple[Any, str]]:
    return regions_of(sample(document), RegionCropsConfig(**options), SIZE)


def test_the_forms_of_regions() -> None:
    """A list, GRIT's spans of the caption (stored as floats), and objects in pixels. Would catch another order of a
    span's numbers, and sides that change places."""
    assert read({"regions": [SKY, BOAT]}) == [((0, 0, 1, 0.25), "a blue sky"), ((0.25, 0.5, 0.5, 0.75), "an old boat")]
    assert read(GRIT, regions="ref_exps") == [((0.1, 0.2, 0.5, 0.6), "A dog in a field of flowers")]
    assert read(GRIT, regions="noun_chunks") == [((0.1, 0.2, 0.5, 0.6), "A dog"), ((0, 0, 1, 1), "a field")]
    objects = {"objects": [{"name": "cup", "colour": "red", "box": [20, 50, 100, 100], "place": "below"}]}
    regions = read(objects, regions="objects", text="a {colour} {name}", unit="pixel")
    assert regions == [((0.1, 0.5, 0.5, 1.0), "a red cup")]


@pytest.mark.parametrize(
    ("document", "options", "message"),
    [
        ({}, {}, "no regions: the json has no list 'regions', or an empty one"),
        ({"regions": []}, {}, "no regions"),
        ({"regions": {"box": [0, 0, 1, 1]}}, {}, "no regions"),
        ({"regions": [BOAT, {"box": [0, 0, 1, 1]}]}, {}, "'regions', entry 1 is not a region: KeyError: 'text'"),
        ({"regions": [{"box": [0, 0, 1], "text": "a"}]}, {}, "entry 0 is not a region: ValueError"),
        ({"regions": [{"box": None, "text": "a"}]}, {}, "entry 0 is not a region: TypeError"),
        ({"regions": ["a boat"]}, {}, "entry 0 is not a region: TypeError"),
        ({"regions": [{**BOAT, "text": " . "}]}, {}, "entry 0 has no text"),
        ({"regions": [{**BOAT, "box": [20, 50, 100, 100]}]}, {}, "is not within the picture of 200 x 100 pixels"),
        ({"regions": [{**BOAT, "box": [0, 0, 300, 100]}]}, {"unit": "pixel"}, "is not within the picture"),
        ({"regions": [{**BOAT, "box": [0.5, 0.5, 0.25, 0.75]}]}, {}, "is not within the picture"),
        ({"regions": [{**BOAT, "box": [0, 0, float("nan"), 1]}]}, {}, "is not within the picture"),
        ({"ref_exps": [[0, 5, 0.1, 0.2, 0.5, 0.6, 0.9]]}, {"regions": "ref_exps"}, "KeyError: 'caption'"),
        ({**GRIT, "ref_exps": [[0, float("inf"), 0, 0, 1, 1, 1]]}, {"regions": "ref_exps"}, "OverflowError"),
        ({**GRIT, "ref_exps": [[30, 40, 0, 0, 1, 1, 1]]}, {"regions": "ref_exps"}, "entry 0 has no text"),
    ],
)  # fmt: skip
def test_what_is_no_region(document: Any, options: dict[str, Any], message: str) -> None:
    """The sample is skipped, with the reason. Would catch boxes in pixels that are taken for shares, those of a picture
    that was resized, and a crop of anything where there is no region."""
    with pytest.raises(BadSample, match=message.replace("(", r"\(")):
        read(document, **options)


def test_where_crops_lie() -> None:
    """Of 3,000 regions the crop is inside the picture and holds all of the region's pixels; it is as large as the
    margin says, no narrower than 3 : 4 where the picture has the room, and the region may touch each of its sides."""
    rng, width, height = np.random.default_rng(0), 120, 90
    touched, grown = set(), []
    for _ in range(3000):
        x, y = np.sort(rng.integers(0, width + 1, 2)), np.sort(rng.integers(0, height + 1, 2))
        if x[0] == x[1] or y[0] == y[1]:
            continue
        edges = (x[0] / width, y[0] / height, x[1] / width, y[1] / height)
        left, top, w, h = around(edges, (width, height), (0.1, 0.5), rng)
        assert 0 <= left <= x[0] < x[1] <= left + w <= width
        assert 0 <= top <= y[0] < y[1] <= top + h <= height
        across, down = x[1] - x[0], y[1] - y[0]
        assert 4 * w >= 3 * min(h, width * 4 // 3) - 4
        assert 4 * h >= 3 * min(w, height * 4 // 3) - 4
        if 3 * across <= 4 * down and 3 * down <= 4 * across and max(w / width, h / height) < 1:
            grown += [w / across, h / down] if min(across, down) >= 20 else []
        gaps = {"left": x[0] - left, "top": y[0] - top, "right": left + w - x[1], "bottom": top + h - y[1]}
        touched |= {side for side, gap in gaps.items() if gap == 0 < sum(gaps.values())}
    assert touched == {"left", "top", "right", "bottom"}
    assert 1.05 < min(grown) < 1.15
    assert 1.45 < max(grown) < 1.55


def test_a_crop_without_margin_is_the_region() -> None:
    """Whole pixels stay whole pixels on their way through shares."""
    rng = np.random.default_rng(0)
    for size in (96, 97, 224):
        for left in range(size - 30):
            box = around((left / size, 7 / size, (left + 30) / size, 37 / size), (size, size), (0.0, 0.0), rng)
            assert box == (left, 7, 30, 30)


def views_of(registry: Registry, path: Path | str, *overrides: str) -> SampleViews:
    options = ["augment.image+text=region_crops", "evaluate=null", *overrides]
    recipe = load_recipe(path, registry=registry, overrides=options)
    augment, joint = recipe.build_augmentations()
    return SampleViews(augment, recipe.seed, recipe.data.optional, joint)


def said(views: list[View]) -> list[tuple[str, str]]:
    return [(view.role, str(view.data)) for view in views]


def test_local_views_are_the_regions(registry: Registry, tiny_recipe: Path) -> None:
    """Each as often as the others, the global texts as they were. Would catch local texts of the captions, regions that
    are drawn twice before all are, and boxes of other pictures."""
    options = ("augment.image.local=3", "augment.image.flip=0", "augment.image+text.margin=[0.0,0.0]")
    views, own = views_of(registry, tiny_recipe, *options), views_of(registry, tiny_recipe, "augment.image+text=none")
    both, pairs = sample({"regions": [SKY, BOAT]}), []
    for epoch in range(200):
        drawn_views = views(both, epoch)
        assert [view.role for view in drawn_views["image"]] == ["global"] * 2 + ["local"] * 3
        assert said(drawn_views["text"])[:2] == said(own(both, epoch)["text"])[:2]
        assert {text for role, text in said(drawn_views["text"]) if role == "local"} == {"a blue sky", "an old boat"}
        for picture, text in zip(drawn_views["image"][2:], drawn_views["text"][2:], strict=True):
            pairs.append(str(text.data))
            region = SKY if text.data == "a blue sky" else BOAT
            left, top, right, bottom = picture.extra["box"]
            assert left <= region["box"][0] <= region["box"][2] <= right, text
            assert top <= region["box"][1] <= region["box"][3] <= bottom, text
    assert pairs.count("an old boat") == pytest.approx(300, abs=40)


def test_samples_that_lack_something(registry: Registry, tiny_recipe: Path) -> None:
    """Without regions a sample is skipped, also where it may lack a text; without a text it then has its picture's own
    views. Would catch crops of anything that go with sentences of the caption."""
    options = ("data.optional=[text]", "fusion=null", "teacher=null", "loss=[{name: contrastive}]")
    views = views_of(registry, tiny_recipe, *options)
    with pytest.raises(BadSample, match="no regions"):
        views(sample({}), 0)
    whole = sample({"regions": [BOAT]})
    bare = {name: value for name, value in whole.items() if name not in ("json", "txt")}
    assert list(views(bare, 0)) == ["image"]
    assert list(views(whole, 0)) == ["image", "text"]
    with pytest.raises(RecipeErrors, match="'region_crops' makes views of 'text' that its own augmentation does not"):
        views_of(registry, tiny_recipe, *options, "augment.image.local=2")


def test_what_it_takes(registry: Registry, tiny_recipe: Path) -> None:
    """Local crops, and any captions; a loss of pairs needs them. Refused before anything is read."""
    options = ["evaluate=null", "augment.image+text=region_crops", "loss.2=paired_contrastive"]
    recipe = load_recipe(tiny_recipe, registry=registry, overrides=[*options, "augment.image.local=2"])
    assert recipe.plan.modalities["text"].roles == ("global", "global", "local", "local")
    with pytest.raises(RecipeErrors, match="'region_crops': takes pictures of 'multi_crop' with local crops, and capt"):
        load_recipe(tiny_recipe, registry=registry, overrides=[*options, "augment.image.local=0"])
    with pytest.raises(RecipeErrors, match="pairs local views, of which there are 2 of 'image', 1 of 'text'"):
        load_recipe(tiny_recipe, registry=registry, overrides=["loss.2=paired_contrastive", "augment.image.local=2"])


@pytest.mark.parametrize("text", ["{name: text_crop}", "{name: caption, fields: [raw_caption]}"])
@pytest.mark.parametrize("joint", ["region_crops", "{name: region_crops, regions: objects, unit: pixel}"])
def test_a_batch_without_data(registry: Registry, tiny_recipe: Path, text: str, joint: str) -> None:
    """For costs and choices of kernels, whatever the options. Would catch an example whose json hides the caption's."""
    options = [f"augment.text={text}", f"augment.image+text={joint}", "augment.image.local=2", "evaluate=null"]
    batch = example_batch(load_recipe(tiny_recipe, registry=registry, overrides=options), 2)
    assert batch.views["text"].roles[-2:] == batch.views["image"].roles[-2:] == ("local", "local")


def test_the_loss_of_pairs_is_the_mean_of_each_ones_own() -> None:
    """Would catch views that are pairs with all others, and global views among them."""
    torch.manual_seed(0)
    image = ModalityPlan(("global", "local", "local"), BackboneSpec(8, 6))
    text = ModalityPlan(("global", "global", "local", "local"), BackboneSpec(8, 6))
    loss = PairedContrastive(PairedConfig(temperature=0.25), Plan({"image": image, "text": text})).double()
    x, y = (torch.randn(views, 5, 6, dtype=torch.float64, requires_grad=True) for views in (3, 4))
    outputs = Outputs(
        {}, {"image": Features(x), "text": Features(y)}, {}, {}, None, Progress(0, 1), ema=lambda module: module
    )
    terms, _ = loss(outputs)
    expected = torch.zeros((), dtype=torch.float64)
    for i, j in ((1, 2), (2, 3)):
        logits = loss.logit_scale.exp() * normalize(x[i], dim=-1) @ normalize(y[j], dim=-1).T
        expected = expected + (cross_entropy(logits, torch.arange(5)) + cross_entropy(logits.T, torch.arange(5))) / 4
    torch.testing.assert_close(terms["paired_contrastive"], expected, rtol=1e-10, atol=1e-10)
    (of_x, of_y) = torch.autograd.grad(terms["paired_contrastive"], (x, y))
    assert [bool(g.abs().sum()) for g in (*of_x, *of_y)] == [False, True, True, False, False, True, True]
