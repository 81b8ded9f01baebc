"""Sources of pictures and masks: the numbers that the task gets, the published layouts, what is missing."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from distill_core.errors import BadSample, DataError
from distill_segment.classes import parse_classes, read_mask
from distill_segment.folders import LAYOUTS, ImageMaskConfig, ImageMaskFolder, SegmentationSet, SegmentationSetConfig


def write(path: Path, pixels: Any, mode: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(np.asarray(pixels))
    if mode == "P":
        picture.putpalette([(7 * i) % 256 for i in range(768)])  # colours that are not the numbers
    picture.save(path)


PHOTO = np.zeros((2, 3, 3), np.uint8)
RAW = np.array([[0, 1, 2], [19, 255, 1]], np.uint8)


def test_a_folder(tmp_path: Path) -> None:
    """Names pair up over suffixes and subfolders; a value of one's own is left out, and 0 where asked."""
    write(tmp_path / "i/a/one.jpg", PHOTO)
    write(tmp_path / "i/two.PNG.png", PHOTO)
    write(tmp_path / "m/a/one_mask.png", RAW)
    write(tmp_path / "m/two.PNG_mask.png", np.where(RAW == 255, np.uint16(1000), RAW))
    (tmp_path / "classes.txt").write_text("cat, kitten\ndog\n")
    options = {"images": str(tmp_path / "i"), "masks": str(tmp_path / "m"), "classes": str(tmp_path / "classes.txt")}
    source = ImageMaskFolder(ImageMaskConfig(**options, mask_suffix="_mask.png", ignore=1000, split="validation"))
    assert (source.sets("validation"), source.samples("test")) == ({}, {})
    for _ in range(2):  # read again and again
        one, two = source.samples("validation")["data"]
        assert (one["__key__"], two["__key__"]) == ("a/one", "two.PNG")
        assert read_mask(one["mask.png"]).tolist() == [[0, 1, 2], [19, 255, 1]]
        assert read_mask(two["mask.png"]).tolist() == [[0, 1, 2], [19, 255, 1]]
        assert one["classes.txt"] == b"cat, kitten\ndog\n"
        assert Image.open(io.BytesIO(one["jpg"])).size == Image.open(io.BytesIO(two["png"])).size == (3, 2)
    reduced = ImageMaskFolder(ImageMaskConfig(**options, mask_suffix="_mask.png", reduce_zero_label=True))
    one, two = reduced.samples("test")["data"]
    assert read_mask(one["mask.png"]).tolist() == [[255, 0, 1], [18, 255, 0]]
    with pytest.raises(BadSample, match="the mask has the value 1000"):  # as a class it would be 999
        read_mask(two["mask.png"])


@pytest.mark.parametrize("value", [256, 300])
def test_numbers_above_a_byte_are_refused_before_they_are_moved(tmp_path: Path, value: int) -> None:
    """256 less one would be 255, which is not scored."""
    write(tmp_path / "i/x.jpg", PHOTO)
    write(tmp_path / "m/x.png", np.full((2, 3), value, np.uint16))
    (tmp_path / "classes.txt").write_text("cat\n")
    options = {"images": str(tmp_path / "i"), "masks": str(tmp_path / "m"), "classes": str(tmp_path / "classes.txt")}
    (one,) = ImageMaskFolder(ImageMaskConfig(**options, reduce_zero_label=True)).samples("test")["data"]
    with pytest.raises(BadSample, match=f"the mask has the value {value}"):
        read_mask(one["mask.png"])


NAMES = {
    "voc20": ("JPEGImages/x.jpg", "SegmentationClass/x.png", "ImageSets/Segmentation/val.txt"),
    "voc21": ("JPEGImages/x.jpg", "SegmentationClass/x.png", "ImageSets/Segmentation/val.txt"),
    "context59": ("JPEGImages/x.jpg", "SegmentationClassContext/x.png", "ImageSets/SegmentationContext/val.txt"),
    "context60": ("JPEGImages/x.jpg", "SegmentationClassContext/x.png", "ImageSets/SegmentationContext/val.txt"),
    "coco_stuff": ("images/val2017/x.jpg", "annotations/val2017/x_labelTrainIds.png", None),
    "coco_object": ("images/val2017/x.jpg", "annotations/val2017/x_instanceTrainIds.png", None),
    "cityscapes": ("leftImg8bit/val/ulm/x_leftImg8bit.png", "gtFine/val/ulm/x_gtFine_labelTrainIds.png", None),
    "ade20k": ("images/validation/x.jpg", "annotations/validation/x.png", None),
}
COUNTS = dict(zip(NAMES, (20, 21, 59, 60, 171, 81, 19, 150), strict=True))


@pytest.mark.parametrize("layout", NAMES)
def test_published_layouts(tmp_path: Path, layout: str) -> None:
    """Sets that count from one lose 0; the others keep it, as the background where they have one."""
    assert set(LAYOUTS) == set(NAMES)
    image, mask, listed = NAMES[layout]
    write(tmp_path / image, PHOTO)
    write(tmp_path / mask, RAW, "P" if layout.startswith("voc") else None)
    if listed:
        (tmp_path / listed).parent.mkdir(parents=True)
        (tmp_path / listed).write_text("x\n")
        write(tmp_path / Path(mask).parent / "not_in_the_list.png", RAW)
    source = SegmentationSet(SegmentationSetConfig.model_validate({"layout": layout, "root": str(tmp_path)}))
    (sample,) = source.samples("test")[layout]
    from_one = layout in ("voc20", "context59", "ade20k")
    expected = [[255, 0, 1], [18, 255, 0]] if from_one else RAW.tolist()
    assert read_mask(sample["mask.png"]).tolist() == expected
    classes = parse_classes(sample["classes.txt"].decode(), "its own")
    assert len(classes) == COUNTS[layout]
    background = layout in ("voc21", "context60", "coco_object")
    assert (classes[0] == ("background",)) == background


def test_no_name_is_broken_over_a_line() -> None:
    for layout in LAYOUTS.values():
        assert not [name for name in layout.classes if "- " in name or " -" in name]


def test_known_places_in_the_lists() -> None:
    """Would catch a name that is missing, or one too many, in the middle of a list."""
    for layout, places in {
        "voc21": {1: "aeroplane", 15: "person", 20: "tv monitor"},
        "context60": {1: "aeroplane", 23: "dog", 59: "wood"},
        "coco_stuff": {0: "person", 79: "toothbrush", 80: "banner", 91: "ceiling-tile", 116: "house", 170: "wood"},
        "cityscapes": {0: "road", 8: "vegetation", 11: "person", 18: "bicycle"},
        "ade20k": {0: "wall", 12: "person", 20: "car", 75: "swivel chair", 127: "bicycle", 149: "flag"},
    }.items():
        for number, name in places.items():
            assert LAYOUTS[layout].classes[number] == name


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    def said(layout: str = "ade20k", **options: str) -> str:
        with pytest.raises(DataError) as caught:
            SegmentationSet(
                SegmentationSetConfig.model_validate({"layout": layout, "root": str(tmp_path), **options})
            ).samples("test")
        return str(caught.value).replace(str(tmp_path), "ROOT")

    assert (
        said()
        == "ROOT/images/validation: no such folder; ade20k has images/validation and annotations/validation in `root`"
    )
    (tmp_path / "images/validation").mkdir(parents=True)
    (tmp_path / "annotations/validation").mkdir(parents=True)
    assert said() == "ROOT/annotations/validation: no mask NAME.png"
    write(tmp_path / "annotations/validation/x.png", RAW)
    assert said() == "1 of 1 samples lack a file: ROOT/images/validation/x.jpg"
    write(tmp_path / "images/validation/x.jpg", PHOTO)
    (tmp_path / "mine.txt").write_text("wall\nbuilding\n")
    assert said(classes=str(tmp_path / "mine.txt")) == "ROOT/mine.txt: 2 classes; ade20k has 150"
    (tmp_path / "JPEGImages").mkdir()
    (tmp_path / "SegmentationClass").mkdir()
    assert said("voc20").startswith("ROOT/ImageSets/Segmentation/val.txt: the list of names cannot be read")
    (tmp_path / "ImageSets/Segmentation").mkdir(parents=True)
    (tmp_path / "ImageSets/Segmentation/val.txt").write_text("y\n")
    write(tmp_path / "JPEGImages/y.jpg", PHOTO)
    assert said("voc20") == "1 of 1 samples lack a file: ROOT/SegmentationClass/y.png"
