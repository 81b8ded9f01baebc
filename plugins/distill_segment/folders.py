"""Sources of pictures and masks in folders: any, and the layouts of published sets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from distill_core import BadSample, ComponentConfig, DataError, Sample
from distill_layouts.scored import ScoredSource
from distill_segment import names
from distill_segment.classes import IGNORE, parse_classes, read_classes, read_mask, write_mask

PICTURES = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True)
class Masks:
    """How to read a folder's masks, and how the files of a sample are named: NAME + suffix."""

    mask_suffix: str = ".png"
    image_suffixes: tuple[str, ...] = PICTURES
    ignore: int = IGNORE
    reduce_zero_label: bool = False

    def numbers(self, data: bytes) -> bytes:
        """A mask file with class numbers as the task reads them; the same bytes where there is nothing to change, or
        where it cannot be read: the task will say so."""  # fmt: skip
        if not self.reduce_zero_label and self.ignore == IGNORE:
            return data
        try:
            mask = read_mask(data, self.ignore)
        except BadSample:
            return data
        ignored = (mask == self.ignore) | (mask == IGNORE)
        if self.reduce_zero_label:
            ignored |= mask == 0
            mask = mask - 1
        return write_mask(np.where(ignored, IGNORE, mask))


class Pairs:
    """The samples of pairs of files, read again in each iteration."""

    def __init__(self, pairs: Sequence[tuple[str, Path, Path]], masks: Masks, classes: bytes) -> None:
        """`pairs` are (key, picture, mask)."""
        self.pairs, self.masks, self.classes = pairs, masks, classes

    def __iter__(self) -> Iterator[Sample]:
        for key, image, mask in self.pairs:
            try:
                picture, numbers = image.read_bytes(), self.masks.numbers(mask.read_bytes())
            except OSError as error:
                raise DataError(f"{error.filename}: cannot be read: {error.strerror}") from error
            field = image.suffix[1:].lower()
            yield {
                "__key__": key, "__url__": str(mask), field: picture, "mask.png": numbers, "classes.txt": self.classes,
            }  # fmt: skip


def pairs_of(
    images: Path, masks: Path, rules: Masks, list_file: Path | None, expected: str = ""
) -> list[tuple[str, Path, Path]]:
    """(name, picture, mask) of each name in the list, or of each mask.

    Raises `DataError` for missing files; `expected` is appended to the message about a folder.
    """
    for folder in (images, masks):
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder{expected}")
    if list_file is not None:
        try:
            keys = [line.strip() for line in list_file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{list_file}: the list of names cannot be read: {error}") from error
    else:
        mask_files = sorted(masks.rglob(f"*{rules.mask_suffix}"))
        keys = [path.relative_to(masks).as_posix().removesuffix(rules.mask_suffix) for path in mask_files]
    if not keys:
        raise DataError(f"{list_file or masks}: no mask NAME{rules.mask_suffix}")
    pairs, missing = [], []
    for key in keys:
        mask = masks / f"{key}{rules.mask_suffix}"
        image = next((path for suffix in rules.image_suffixes if (path := images / f"{key}{suffix}").is_file()), None)
        if image is None:
            missing.append(str(images / f"{key}{rules.image_suffixes[0]}"))
        elif not mask.is_file():
            missing.append(str(mask))
        else:
            pairs.append((key, image, mask))
    if missing:
        ellipsis = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise DataError(f"{len(missing)} of {len(keys)} samples lack a file: {', '.join(missing[:3])}{ellipsis}")
    return pairs


class ImageMaskConfig(ComponentConfig):
    """Where the files are, and what a mask's values mean."""

    images: str
    """Folder of pictures."""
    masks: str
    """Folder of masks, a class number a pixel (PNG of mode L, P or I); subfolders are searched."""
    classes: str
    """File of the classes, one a line in the order of the masks' values, words for one class separated by commas."""
    list: str | None = None
    """File of the names to take, one a line, without suffix; null takes all masks."""
    mask_suffix: str = ".png"
    """Suffix of a mask's file name, after the NAME that it shares with its picture."""
    image_suffixes: tuple[str, ...] = Field(PICTURES, min_length=1)
    """Possible suffixes of a picture's file name; the first that exists is used."""
    ignore: int = Field(IGNORE, ge=0, le=65535)
    """The masks' value for pixels that are not scored, in addition to 255."""
    reduce_zero_label: bool = False
    """Whether 0 is not scored either and classes start at 1, as in ADE20K."""
    split: str = "test"
    """The split that it is; tasks are left out on any other."""


class ImageMaskFolder(ScoredSource):
    """A folder of pictures and one of masks, of the same names. For `segmentation`, as a task's own `source`."""

    name = "image_mask_folder"
    Config = ImageMaskConfig
    examples = ({"images": "no such folder", "masks": "masks", "classes": "classes.txt"},)

    def __init__(self, config: ImageMaskConfig) -> None:
        super().__init__(config)
        self.config: ImageMaskConfig = config

    def scored(self) -> dict[str, Iterable[Sample]]:
        """One set, `data`. Raises `DataError` for files that are missing."""
        options = self.config
        rules = Masks(options.mask_suffix, options.image_suffixes, options.ignore, options.reduce_zero_label)
        images, masks = (Path(folder).expanduser() for folder in (options.images, options.masks))
        pairs = pairs_of(images, masks, rules, Path(options.list).expanduser() if options.list else None)
        return {"data": Pairs(pairs, rules, read_classes(options.classes))}


@dataclass(frozen=True)
class Layout:
    """A published set: where its files are below the root, and its classes."""

    images: str
    masks: str
    classes: tuple[str, ...]
    rules: Masks = Masks(image_suffixes=(".jpg",))
    list_file: str | None = None


_BACKGROUND = ("background",)
_VOC = ("JPEGImages", "SegmentationClass")
_VOC_LIST = "ImageSets/Segmentation/val.txt"
_CONTEXT = ("JPEGImages", "SegmentationClassContext")
_CONTEXT_LIST = "ImageSets/SegmentationContext/val.txt"
_COCO = ("images/val2017", "annotations/val2017")
_FROM_ONE = Masks(image_suffixes=(".jpg",), reduce_zero_label=True)

LAYOUTS = {
    "voc20": Layout(*_VOC, names.VOC, _FROM_ONE, _VOC_LIST),
    "voc21": Layout(*_VOC, _BACKGROUND + names.VOC, list_file=_VOC_LIST),
    "context59": Layout(*_CONTEXT, names.CONTEXT, _FROM_ONE, _CONTEXT_LIST),
    "context60": Layout(*_CONTEXT, _BACKGROUND + names.CONTEXT, list_file=_CONTEXT_LIST),
    "coco_stuff": Layout(*_COCO, names.COCO_STUFF, Masks("_labelTrainIds.png", (".jpg",))),
    "coco_object": Layout(*_COCO, _BACKGROUND + names.COCO_OBJECT, Masks("_instanceTrainIds.png", (".jpg",))),
    "cityscapes": Layout(
        "leftImg8bit/val", "gtFine/val", names.CITYSCAPES, Masks("_gtFine_labelTrainIds.png", ("_leftImg8bit.png",))
    ),
    "ade20k": Layout("images/validation", "annotations/validation", names.ADE20K, _FROM_ONE),
}
"""The validation parts, laid out as MMSegmentation's documents on preparing data sets say."""


class SegmentationSetConfig(ComponentConfig):
    """Which set, and where your copy is."""

    layout: Literal["voc20", "voc21", "context59", "context60", "coco_stuff", "coco_object", "cityscapes", "ade20k"]
    """The set; 20 and 59 leave the background out, 21 and 60 have it as class 0."""
    root: str
    """The folder that the layout's folders are in."""
    classes: str | None = None
    """File of the classes in place of the set's own names, for further words (see `image_mask_folder`)."""
    split: str = "test"
    """The split that it is; tasks are left out on any other."""


class SegmentationSet(ScoredSource):
    """Your copy of VOC, Pascal Context, COCO-Stuff, COCO-Object, Cityscapes or ADE20K: its validation part."""

    name = "segmentation_set"
    Config = SegmentationSetConfig
    examples = ({"layout": "voc21", "root": "no such folder"},)

    def __init__(self, config: SegmentationSetConfig) -> None:
        super().__init__(config)
        self.config: SegmentationSetConfig = config

    def scored(self) -> dict[str, Iterable[Sample]]:
        """One set, of the layout's name. Raises `DataError` for files that are missing."""
        layout, root = LAYOUTS[self.config.layout], Path(self.config.root).expanduser()
        list_file = root / layout.list_file if layout.list_file else None
        expected = f"; {self.config.layout} has {layout.images} and {layout.masks} in `root`"
        pairs = pairs_of(root / layout.images, root / layout.masks, layout.rules, list_file, expected)
        classes = "\n".join(layout.classes).encode()
        if self.config.classes is not None:
            classes = read_classes(self.config.classes)
            classes_of_file = parse_classes(classes.decode(), self.config.classes)
            if len(classes_of_file) != len(layout.classes):
                counts = f"{len(classes_of_file)} classes; {self.config.layout} has {len(layout.classes)}"
                raise DataError(f"{self.config.classes}: {counts}")
        return {self.config.layout: Pairs(pairs, layout.rules, classes)}
