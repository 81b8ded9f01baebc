"""`region_crops` on icon scenes: a thousand crops, each with the icon that its text names in it."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from distill_core import Sample, View
from distill_core.data.batches import SampleViews
from distill_vl.caption import WholeCaption
from distill_vl.multi_crop import MultiCrop
from distill_vl.region_crops import RegionCrops, RegionCropsConfig

pytest.importorskip("resvg_py")
SIZE = 96
CROPS = {"size": 32, "local_size": 32, "global": 1, "local": 4, "recolour": False, "flip": 0.5}


@pytest.fixture(scope="module")
def pairs(scenes: list[Sample]) -> list[tuple[dict[str, Any], View, str]]:
    """A scene's record with its png, a crop, and the text of the same number."""
    parts = {"image": MultiCrop(MultiCrop.Config.model_validate(CROPS)), "text": WholeCaption(WholeCaption.Config())}
    options = RegionCropsConfig(regions="objects", text="{colour} {name}", unit="pixel", margin=(0.0, 0.2))
    views = SampleViews(parts, 0, joint={"image+text": RegionCrops(options, parts)})
    drawn = []
    for epoch in range(5):
        for scene in scenes:
            one = views(scene, epoch)
            crops = zip(one["image"][1:], one["text"][1:], strict=True)
            record = {**json.loads(scene["json"]), "png": scene["png"]}
            drawn += [(record, picture, str(text.data)) for picture, text in crops]
    assert len(drawn) == 1200
    return drawn


def named(record: dict[str, Any], text: str) -> dict[str, Any]:
    (one,) = [one for one in record["objects"] if f"{one['colour']} {one['name']}" == text]
    return one


def inside(view: View, one: dict[str, Any]) -> bool:
    outer, inner = view.extra["box"] * SIZE, one["box"]
    return bool(np.all(outer[:2] <= np.add(inner[:2], 0.01)) and np.all(np.subtract(inner[2:], 0.01) <= outer[2:]))


def test_the_named_icon_is_in_the_crop(pairs: list[tuple[dict[str, Any], View, str]]) -> None:
    """By its box, of all of them; of another icon of the scene that is so in a few crops alone, so texts in another
    order would be seen."""
    assert all(inside(picture, named(record, text)) for record, picture, text in pairs)
    others = [
        inside(picture, one)
        for record, picture, text in pairs
        for one in record["objects"]
        if one is not named(record, text) and one["name"] != named(record, text)["name"]
    ]
    assert np.mean(others) < 0.1


def test_the_crop_is_cut_by_its_box(pairs: list[tuple[dict[str, Any], View, str]]) -> None:
    """Against Pillow, mirrored where the view says so. Would catch a box that is noted while another one is cut."""
    for record, picture, text in pairs:
        box = np.round(picture.extra["box"] * SIZE).astype(int)
        with Image.open(io.BytesIO(record["png"])) as scene:
            crop = scene.convert("RGB").crop(tuple(box.tolist())).resize((32, 32), Image.Resampling.BICUBIC)
        pixels = np.array(crop).transpose(2, 0, 1).astype(int)
        pixels = pixels[..., ::-1] if picture.extra["flip"] else pixels
        assert np.abs(picture.data.numpy() - pixels).mean() < 0.5, (text, box)
