"""Views of scenes whose sentences say what is left of what: `caption_aware_flips` over thousands of draws."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
import torch

from distill_core import Sample, View
from distill_core.data.batches import SampleViews
from distill_cosmos.text_crop import TextCrop
from distill_vl.caption_aware_flips import CaptionAwareFlips, CaptionAwareFlipsConfig
from distill_vl.multi_crop import MultiCrop

pytest.importorskip("resvg_py")
EPOCHS = 50
Draw = tuple[Sample, list[View], list[str], list[View], list[str]]
"""A sample; its pictures and texts; those of the own augmentations."""


def drawn(scenes: list[Sample], device: str = "cpu", **options: Any) -> list[Draw]:
    """Each scene in each epoch, its texts of one sentence each."""

    def crops(**options: Any) -> MultiCrop:
        small = {"size": 16, "local_size": 8, "global": 2, "local": 1, "device": device, **options}
        return MultiCrop(MultiCrop.Config.model_validate(small))

    text = TextCrop(TextCrop.Config.model_validate({"global": 1, "local": 1, "sentences": 1}))
    parts = {"image": crops(), "text": text}
    joint = CaptionAwareFlips(CaptionAwareFlipsConfig(**options), parts)
    views, own = SampleViews(parts, 0, joint={"image+text": joint}), SampleViews(parts, 0)
    draws = []
    for epoch in range(EPOCHS):
        for scene in scenes:
            made, plain = views(scene, epoch), own(scene, epoch)
            texts = [[str(view.data) for view in side["text"]] for side in (made, plain)]
            draws.append((scene, made["image"], texts[0], plain["image"], texts[1]))
    return draws


def says_a_side(texts: list[str]) -> bool:
    return bool({"left", "right"} & {word for text in texts for word in text.split()})


def flips(views: list[View]) -> list[bool]:
    return [bool(view.extra["flip"]) for view in views]


def same(a: View, b: View, mirrored: bool) -> bool:
    """Whether two views hold the same crop, of which one may be mirrored; and its extras but the flip."""
    x, y = a.data.float(), (b.data.flip(-1) if mirrored else b.data).float()
    others = [{k: v for k, v in view.extra.items() if k != "flip"} for view in (a, b)]
    return torch.equal(x, y) and all(np.array_equal(others[0][k], others[1][k]) for k in others[1])


@pytest.mark.parametrize("device", ["cpu", "model"])
def test_no_mirrored_picture_goes_with_a_text_that_names_a_side(scenes: list[Sample], device: str) -> None:
    """Of 3,000 draws: where a text names a side, every picture is the very crop, not mirrored; elsewhere nothing
    changes. Would catch a flip that is only noted otherwise, and a text that is changed."""
    draws, told = drawn(scenes, device), 0
    assert len(draws) == 3000
    free: list[bool] = []
    for _, pictures, texts, own, own_texts in draws:
        assert texts == own_texts
        if says_a_side(texts):
            told += 1
            assert not any(flips(pictures))
            assert all(same(a, b, mirrored=f) for a, b, f in zip(pictures, own, flips(own), strict=True))
        else:
            assert flips(pictures) == flips(own)
            assert all(same(a, b, mirrored=False) for a, b in zip(pictures, own, strict=True))
            free += flips(pictures)
    assert 0.3 < told / len(draws) < 0.9
    assert np.mean(free) == pytest.approx(0.5, abs=0.05)
    assert any(any(flips(own)) for _, _, texts, own, _ in draws if says_a_side(texts)), "there was something to do"


def test_a_view_that_is_not_mirrored_is_that_of_an_augmentation_without_flips(scenes: list[Sample]) -> None:
    """Would catch a crop that is mirrored about another axis, or a flip that comes before the jitter."""
    options = {"size": 16, "local_size": 8, "global": 2, "local": 1}
    plain = MultiCrop(MultiCrop.Config.model_validate({**options, "flip": 0.0}))
    draws = [draw for draw in drawn(scenes[:8]) if says_a_side(draw[2])]
    for scene, pictures, *_ in draws:
        candidates = SampleViews({"image": plain}, 0)
        epochs = [candidates(scene, epoch)["image"] for epoch in range(EPOCHS)]
        assert any(all(same(a, b, False) for a, b in zip(pictures, views, strict=True)) for views in epochs)


def is_true(text: str, scene: Sample, mirrored: bool) -> bool | None:
    """Whether a sentence about sides or places holds in the scene, or in the mirrored one; None: about neither."""
    record, size = json.loads(scene["json"]), 96
    centres: dict[str, list[float]] = {}
    for one in record["objects"]:
        left, _, right, _ = one["box"]
        x = (left + right) / 2
        centres.setdefault(f"{one['colour']} {one['name']}", []).append(size - x if mirrored else x)
    if match := re.fullmatch(r"an? (.+) (left|right) of an? (.+)", text):
        one, side, other = match.groups()
        pairs = [(a, b) for a in centres[one] for b in centres[other]]
        return any(a < b if side == "left" else a > b for a, b in pairs)
    if match := re.fullmatch(r"an? (.+?) (?:on the|in the upper|in the lower) (left|right)", text):
        one, side = match.groups()
        return any(x < size / 2 if side == "left" else x > size / 2 for x in centres[one])
    return None


def test_exchanged_words_are_true_of_the_mirrored_scene(scenes: list[Sample]) -> None:
    """All pictures of a sample that names a side are mirrored, or none; then what its texts say is true of what is
    seen, by the boxes. Would catch words that are exchanged in some texts alone, or where nothing is mirrored."""
    judged, seen = 0, []
    for scene, pictures, texts, own, own_texts in drawn(scenes, exchange=True):
        assert all(same(a, b, x != y) for a, b, x, y in zip(pictures, own, flips(pictures), flips(own), strict=True))
        if not says_a_side(own_texts):
            assert (texts, flips(pictures)) == (own_texts, flips(own))
            continue
        assert set(flips(pictures)) == {flips(own)[0]}
        mirrored = flips(pictures)[0]
        seen.append(mirrored)
        assert (texts == own_texts) == (not mirrored)
        for text in texts:
            truth = is_true(text, scene, mirrored)
            judged += truth is not None
            assert truth is not False, (text, own_texts, mirrored)
    assert judged > 1000
    assert np.mean(seen) == pytest.approx(0.5, abs=0.05)
