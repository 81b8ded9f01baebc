"""Captioned pictures: Karpathy's splits of COCO and Flickr, Urban-1k, DCI, and lists of pairs.

Captions come as `references` in the sample's json: each is an item by itself, so that a picture may have several.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from distill_benchmarks.files import (
    PICTURES,
    FileSample,
    FileSamples,
    FileSource,
    NamedSplits,
    document,
    folder,
    inside,
    is_there,
    number,
    read,
    some_are_there,
)
from distill_core import BadSample, ComponentConfig, DataError, Sample

csv.field_size_limit(10_000_000)


class KarpathyConfig(ComponentConfig):
    """Options of `karpathy`."""

    annotations: str
    """The json of the split: dataset_coco.json, dataset_flickr30k.json or dataset_flickr8k.json."""
    images: str
    """The folder of the pictures; of COCO the one that holds train2014 and val2014 (or all pictures at once)."""
    captions: Annotated[int, Field(gt=0)] | None = 5
    """Captions that are taken of each picture, the first; null takes all (some of COCO's have 6 or 7)."""


class Karpathy(FileSource):
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

    def samples(self, split: str) -> dict[str, Iterable[Sample]]:
        """One set, of the dataset's name. Raises `DataError`."""
        if split not in self.parts:
            return {}
        layout = '{"dataset": ..., "images": [{"filename": ..., "split": ..., "sentences": [{"raw": ...}]}]}'
        path = Path(self.config.annotations).expanduser()
        content = document(path, layout)
        images = folder(self.config.images, "the pictures that the annotations name")
        samples = []
        try:
            for row in content["images"]:
                if row["split"] in self.parts[split]:
                    captions = [str(sentence["raw"]) for sentence in row["sentences"]][: self.config.captions]
                    file = inside(inside(images, row.get("filepath", "")), row["filename"])
                    if not is_there(file) and is_there(images / row["filename"]):
                        file = images / row["filename"]
                    samples.append(FileSample(row["filename"], file, {"references": captions}))
            name = str(content.get("dataset", path.stem))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise DataError(f"{path}: not in Karpathy's layout ({error!r}); expected {layout}") from error
        some_are_there(samples, images, "the pictures as `filepath`/`filename` of the annotations, or `filename`")
        return {name: FileSamples(str(path), samples)}


class Urban1kConfig(ComponentConfig):
    """Options of `urban1k`."""

    folder: str
    """The folder that holds `image` and `caption`."""


class Urban1k(FileSource):
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

    def samples(self, split: str) -> dict[str, Iterable[Sample]]:
        """One set, `urban1k`. Raises `DataError`."""
        if split != "test":
            return {}
        base = folder(self.config.folder, self.layout)
        pictures = {
            path.stem: path
            for path in sorted(folder(base / "image", self.layout).iterdir())
            if path.suffix.lower() in PICTURES
        }
        texts = {path.stem: path for path in folder(base / "caption", self.layout).glob("*.txt")}
        samples = []
        for name in sorted(pictures.keys() | texts.keys(), key=_natural):
            about = {"references": _first_line(texts[name])} if name in texts else {}
            samples.append(FileSample(name, pictures.get(name, base / "image" / f"{name}.jpg"), about))
        some_are_there(samples, base, self.layout)
        return {"urban1k": FileSamples(str(base), samples)}


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
        super().__init__(key, annotation, {})
        self.photos, self.field = photos, "jpg"

    def __getitem__(self, name: str) -> Any:
        if name not in ("json", "jpg"):
            return super().__getitem__(name)
        try:
            annotation = json.loads(read(self.path))
            if name == "jpg":
                return read(inside(self.photos, annotation["image"]))
            both = [annotation[part].strip() for part in ("short_caption", "extra_caption")]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadSample(f"not an annotation of DCI: {error!r}") from error
        return json.dumps({"references": ["\n".join(part for part in both if part)]}).encode()


class Dci(FileSource):
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

    def samples(self, split: str) -> dict[str, Iterable[Sample]]:
        """One set, `dci`. Raises `DataError`."""
        if split not in self.splits(self.config):
            return {}
        base = folder(self.config.folder, self.layout)
        splits_of_file = document(base / "splits.json", self.layout)
        annotation_folder = base / ("annotations" if (base / "annotations").is_dir() else "complete")
        photos = folder(base / "photos", self.layout)
        try:
            chosen = list(splits_of_file.values()) if self.config.whole else [splits_of_file[self.parts[split]]]
            samples = [
                DciSample(str(name), inside(folder(annotation_folder, self.layout), name), photos)
                for part in chosen
                for name in part
            ]
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise DataError(f"{base / 'splits.json'}: no such split ({error!r}); expected {self.layout}") from error
        some_are_there(samples, base, self.layout)
        return {"dci": FileSamples(str(base), samples, photos)}


class PairListConfig(ComponentConfig):
    """Options of `pair_list`. At least one split is named."""

    test: str | None = None
    """The list of the split `test`: .csv or .tsv with a line of column names, or .jsonl."""
    validation: str | None = None
    """The list of the split `validation`."""
    train: str | None = None
    """The list of the split `train`."""
    images: str | None = None
    """The folder that paths start from, and stay inside of; null is that of the list."""
    image: str = "image"
    """The column of the picture's path."""
    caption: str = "caption"
    """The column of the caption; in .jsonl a list holds several."""


class PairList(NamedSplits):
    """Pairs of a picture's path and a caption, from csv, tsv or jsonl. Rows of the same picture are its captions."""

    name = "pair_list"
    Config = PairListConfig
    examples = ({"test": "no-such-folder/pairs.csv"},)

    def samples(self, split: str) -> dict[str, Iterable[Sample]]:
        """One set, of the list's name. Raises `DataError`."""
        if split not in self.splits(self.config):
            return {}
        path = Path(getattr(self.config, split)).expanduser()
        base = path.parent if self.config.images is None else folder(self.config.images, "the pictures of the list")
        captions: dict[str, list[str]] = {}
        files: dict[str, Path] = {}
        for line, row in _rows(path):
            try:
                image, caption = row[self.config.image], row[self.config.caption]
            except KeyError as error:
                raise DataError(
                    f"{path}:{line}: no column {error.args[0]!r} (there are: {', '.join(map(str, row))}); name them "
                    "with the options `image` and `caption`"
                ) from error
            texts = caption if isinstance(caption, list) else [caption]
            if not isinstance(image, str) or not all(isinstance(text, str) for text in texts):
                raise DataError(f"{path}:{line}: should hold a path and a caption, got {image!r} and {caption!r}")
            try:
                files[image] = inside(base, image)
            except ValueError as error:
                raise DataError(f"{path}:{line}: {error}; paths start from the folder `images`") from error
            captions.setdefault(image, []).extend(texts)
        samples = [FileSample(image, files[image], {"references": texts}) for image, texts in captions.items()]
        some_are_there(samples, base, f"the pictures that {path} names")
        return {path.stem: FileSamples(str(path), samples)}


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(line, row by column). Raises `DataError`."""
    layout = "a .csv or .tsv file with a line of column names, or .jsonl"
    if path.suffix not in (".csv", ".tsv", ".jsonl"):
        raise DataError(f"{path}: not a list of pairs: expected {layout}")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix != ".jsonl":
                reader = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
                for row in reader:
                    yield reader.line_num, row
                return
            for line, text in enumerate(file, 1):
                if text.strip():
                    row = json.loads(text)
                    if not isinstance(row, dict):
                        raise DataError(f"{path}:{line}: not an object")
                    yield line, row
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); expected {layout}") from error
    except (ValueError, csv.Error, RecursionError) as error:
        raise DataError(f"{path}: not readable: {error}; expected {layout}") from error
