"""Captioned pictures: Karpathy's splits of COCO and Flickr, Urban-1k and DCI.

Captions come as `references` in the sample's json: each is an item by itself, so that a picture may have several.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from distill_core import BadSample, ComponentConfig, DataError, DataSource, Sample, Shard
from distill_layouts.files import PICTURES, FileSample, document, folder, inside, is_there, number, printable, read
from distill_layouts.shards import check_first, listed, picture_row


class KarpathyConfig(ComponentConfig):
    """Options of `karpathy`."""

    annotations: str
    """The json of the split: dataset_coco.json, dataset_flickr30k.json or dataset_flickr8k.json."""
    images: str
    """The folder of the pictures; of COCO the one that holds train2014 and val2014 (or all pictures at once)."""
    captions: Annotated[int, Field(gt=0)] | None = 5
    """Captions that are taken of each picture, the first; null takes all (some of COCO's have 6 or 7)."""


class Karpathy(DataSource):
    """Karpathy's splits of COCO (5,000 test pictures), Flickr30k and Flickr8k (1,000 each), five captions a picture.

    `validation` is the file's `val`; `train` is its `train` and `restval`.
    """

    name = "karpathy"
    Config = KarpathyConfig
    examples = ({"annotations": "no-such-folder/dataset_coco.json", "images": "no-such-folder"},)
    parts = {"train": ("train", "restval"), "validation": ("val",), "test": ("test",)}  # noqa: RUF012

    @classmethod
    def splits(cls, config: Any) -> tuple[str, ...]:
        return tuple(cls.parts)

    def sets(self, split: str) -> dict[str, list[Shard]]:
        """One set, of the dataset's name. Raises `DataError`."""
        if split not in self.parts:
            return {}
        layout = '{"dataset": ..., "images": [{"filename": ..., "split": ..., "sentences": [{"raw": ...}]}]}'
        path = Path(self.config.annotations).expanduser()
        content = document(path, layout)
        images = folder(self.config.images, "the pictures that the annotations name").absolute()
        rows = []
        try:
            for row in content["images"]:
                if row["split"] in self.parts[split]:
                    captions = [str(sentence["raw"]) for sentence in row["sentences"]][: self.config.captions]
                    file = inside(inside(images, row.get("filepath", "")), row["filename"])
                    if not is_there(file) and is_there(images / row["filename"]):
                        file = images / row["filename"]
                    rows.append(picture_row(row["filename"], file, {"references": captions}))
            name = str(content.get("dataset", path.stem))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise DataError(f"{path}: not in Karpathy's layout ({error!r}); expected {layout}") from error
        shards = listed(str(path), rows)
        check_first(shards, images, "the pictures as `filepath`/`filename` of the annotations, or `filename`")
        return {name: shards}


class Urban1kConfig(ComponentConfig):
    """Options of `urban1k`."""

    folder: str
    """The folder that holds `image` and `caption`."""


class Urban1k(DataSource):
    """Urban-1k (Zhang et al. 2024, Long-CLIP): image/NAME.jpg and caption/NAME.txt, its first line a long caption.

    One split, `test`. Any data in this layout will do.
    """

    name = "urban1k"
    Config = Urban1kConfig
    examples = ({"folder": "no-such-folder/Urban1k"},)
    layout = "image/NAME.jpg and caption/NAME.txt in it"

    @classmethod
    def splits(cls, config: Any) -> tuple[str, ...]:
        return ("test",)

    def sets(self, split: str) -> dict[str, list[Shard]]:
        """One set, `urban1k`. Raises `DataError`."""
        if split != "test":
            return {}
        base = folder(self.config.folder, self.layout).absolute()
        pictures = {
            path.stem: path
            for path in sorted(folder(base / "image", self.layout).iterdir())
            if path.suffix.lower() in PICTURES
        }
        texts = {path.stem: path for path in folder(base / "caption", self.layout).glob("*.txt")}
        rows = []
        for name in sorted(pictures.keys() | texts.keys(), key=_natural):
            about = {"references": _first_line(texts[name])} if name in texts else {}
            rows.append(picture_row(name, pictures.get(name, base / "image" / f"{name}.jpg"), about))
        shards = listed(str(base), rows)
        check_first(shards, base, self.layout)
        return {"urban1k": shards}


def _natural(name: str) -> tuple[int, str]:
    value = number(name)
    return (-1 if value is None else value, name)


def _first_line(path: Path) -> list[str]:
    """The first line with anything in it; none where the file cannot be read, so that the sample is skipped."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
    return [line.strip() for line in lines if line.strip()][:1]


class DciConfig(ComponentConfig):
    """Options of `dci`."""

    folder: str
    """The folder `densely_captioned_images`: splits.json, annotations (or complete), and photos (from SA-1B)."""
    whole: bool = True
    """`test` is every picture of splits.json (7,805), as long-caption retrieval is published; false keeps its own
    three splits (112 pictures to test on)."""


class DciSample(FileSample):
    """Its annotation is read when it is asked for: each holds megabytes of masks."""

    def __init__(self, key: str, annotation: Path, photos: Path) -> None:
        super().__init__(key, printable(str(annotation)), {"json": annotation, "jpg": photos})
        self.annotation, self.photos = annotation, photos

    def __getitem__(self, name: str) -> Any:
        if name not in self.fields:
            return super().__getitem__(name)
        try:
            annotation = json.loads(read(self.annotation))
            if name == "jpg":
                return read(inside(self.photos, annotation["image"]))
            both = [annotation[part].strip() for part in ("short_caption", "extra_caption")]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadSample(f"not an annotation of DCI: {error!r}") from error
        return json.dumps({"references": ["\n".join(part for part in both if part)]}).encode()

    @property
    def paths(self) -> list[Path]:
        """The annotation: which photo it names, only reading it tells."""
        return [self.annotation]


@dataclass(frozen=True)
class DciSamples:
    """A row `{key, annotation}` -> the sample."""

    photos: Path

    def __call__(self, rows: list[tuple[int, Mapping[str, Any]]]) -> Sample:
        ((_, row),) = rows
        return DciSample(row["key"], Path(row["annotation"]), self.photos)


class Dci(DataSource):
    """Densely Captioned Images (Urbanek et al. 2024): the short caption followed by the long one, as one text."""

    name = "dci"
    Config = DciConfig
    examples = ({"folder": "no-such-folder/densely_captioned_images"},)
    layout = "splits.json, annotations/*.json (or complete/*.json) and photos/*.jpg in it"
    parts = {"train": "train", "validation": "valid", "test": "test"}  # noqa: RUF012

    @classmethod
    def splits(cls, config: DciConfig) -> tuple[str, ...]:
        """`test` alone where that is everything."""
        return ("test",) if config.whole else tuple(cls.parts)

    def sets(self, split: str) -> dict[str, list[Shard]]:
        """One set, `dci`. Raises `DataError`."""
        if split not in self.splits(self.config):
            return {}
        base = folder(self.config.folder, self.layout).absolute()
        splits_of_file = document(base / "splits.json", self.layout)
        annotation_folder = base / ("annotations" if (base / "annotations").is_dir() else "complete")
        photos = folder(base / "photos", self.layout)
        try:
            chosen = list(splits_of_file.values()) if self.config.whole else [splits_of_file[self.parts[split]]]
            rows = [
                {"key": str(name), "annotation": str(inside(folder(annotation_folder, self.layout), name))}
                for part in chosen
                for name in part
            ]
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise DataError(f"{base / 'splits.json'}: no such split ({error!r}); expected {self.layout}") from error
        shards = listed(str(base), rows, DciSamples(photos), beside=photos)
        check_first(shards, base, self.layout)
        return {"dci": shards}
