"""Labelled pictures: a folder for each class, and the WebDataset form of CLIP-benchmark."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from distill_benchmarks.files import (
    PICTURES,
    FileSample,
    FileSamples,
    NamedSplits,
    document,
    folder,
    number,
    some_are_there,
)
from distill_core import ComponentConfig, DataError, DataSource, Sample, Shard, Shards, TarShard, fingerprint
from distill_tasks.prompts import plain_lines, read_lines


class ClassFolderConfig(ComponentConfig):
    """Options of `class_folder`. At least one split is named."""

    test: str | None = None
    """The folder of the split `test`; of ImageNet the validation pictures, one folder a synset."""
    validation: str | None = None
    """The folder of the split `validation`."""
    train: str | None = None
    """The folder of the split `train`, for probes to learn from."""
    names: str | None = None
    """A file with the classes' names: `FOLDER name in words` a line, a name a line in the folders' order, or json
    {FOLDER: name}. Null takes the folders' names, with _ for a space."""


class ClassFolder(NamedSplits):
    """Pictures in a folder for each class (CLASS/.../x.jpg), as ImageNet's. Samples' json has `class` and `folder`."""

    name = "class_folder"
    Config = ClassFolderConfig
    examples = ({"test": "no-such-folder/val", "names": "no-such-folder/names.txt"},)
    layout = "a folder for each class in it, as goldfish/1.jpg"

    def samples(self, split: str) -> dict[str, Iterable[Sample]]:
        """One set, of the folder's name. Raises `DataError`."""
        if split not in self.splits(self.config):
            return {}
        base = folder(getattr(self.config, split), self.layout)
        classes = sorted(path.name for path in base.iterdir() if path.is_dir())
        if not classes:
            raise DataError(f"{base}: holds no folder; expected {self.layout}")
        names = _names(self.config.names, classes)
        samples = [
            FileSample(path.relative_to(base).as_posix(), path, {"class": names[name], "folder": name})
            for name in classes
            for path in sorted((base / name).rglob("*"))
            if path.suffix.lower() in PICTURES
        ]
        some_are_there(samples, base, self.layout)
        return {base.name: FileSamples(str(base), samples)}


def _names(option: str | None, classes: Sequence[str]) -> dict[str, str]:
    """Folder -> name in words. Raises `DataError`."""
    if option is None:
        return {name: name.replace("_", " ").strip() for name in classes}
    path = Path(option).expanduser()
    layout = "`FOLDER name in words` a line, a name a line in the folders' order, or json {FOLDER: name}"
    if path.suffix == ".json":
        content = document(path, layout)
        table = {str(key): str(value) for key, value in content.items()} if isinstance(content, dict) else {}
    else:
        lines = read_lines(path, layout)
        table = {head: rest.strip() for head, _, rest in (line.replace("\t", " ").partition(" ") for line in lines)}
        if not any(name in table for name in classes) and len(lines) == len(classes):
            table = dict(zip(classes, lines, strict=True))
    if missing := [name for name in classes if not table.get(name)]:
        raise DataError(
            f"{path}: names {len(missing)} of {len(classes)} classes not, as {missing[0]}; expected {layout}"
        )
    return {name: table[name] for name in classes}


class ClipBenchmarkConfig(ComponentConfig):
    """Options of `clip_benchmark`."""

    folder: str
    """The folder of the dataset, as `clip_benchmark_export_wds` writes it: classnames.txt, test/nshards.txt,
    test/0.tar, ...; of retrieval, dataset_type.txt says so."""


class ClipBenchmark(DataSource):
    """The WebDataset form of CLIP-benchmark: webp, jpg or png with `cls` (a number), or for retrieval with `txt`.

    Its zeroshot_classification_templates.txt is what `zero_shot` takes as `templates`.
    """

    name = "clip_benchmark"
    Config = ClipBenchmarkConfig
    examples = ({"folder": "no-such-folder/wds_cars"},)
    trainable = False
    layout = "test/nshards.txt, test/0.tar, ... and classnames.txt (or dataset_type.txt: retrieval) in it"
    folders = {"train": ("train",), "validation": ("validation", "valid", "val"), "test": ("test",)}  # noqa: RUF012

    def sets(self, split: str) -> dict[str, list[Shard]]:
        """No shards to train on: their labels are numbers."""
        return {}

    def samples(self, split: str) -> dict[str, Iterable[Sample]]:
        """One set, of the folder's name; {} where the split has no folder. Raises `DataError`."""
        base = folder(self.config.folder, self.layout)
        part = next((base / name for name in self.folders.get(split, ()) if (base / name).is_dir()), None)
        if part is None:
            return {}
        kind = " ".join(read_lines(base / "dataset_type.txt", "a word")) if (base / "dataset_type.txt").exists() else ""
        if kind not in ("", "retrieval", "classification"):
            raise DataError(f"{base}: a dataset of type {kind!r} cannot be scored; only classes and retrieval can")
        if kind == "retrieval":
            return {base.name: Numbered(_shards(part, self.layout), None)}
        names = plain_lines(base / "classnames.txt", "the name of a class a line")
        return {base.name: Numbered(_shards(part, self.layout), names)}


def _shards(part: Path, layout: str) -> Shards:
    """Those that nshards.txt counts, or all there are."""
    counted = part / "nshards.txt"
    if not counted.is_file():
        names = sorted(part.glob("*.tar"), key=lambda path: (len(path.name), path.name))
        if not names:
            raise DataError(f"{part}: holds no shard; expected {layout}")
        return Shards([TarShard(path) for path in names])
    word = read_lines(counted, "the number of shards")[0]
    if (count := number(word)) is None:
        raise DataError(f"{counted}: should hold the number of shards, not {word!r}")
    return Shards([TarShard(part / f"{i}.tar") for i in range(count)])


class Numbered:
    """The samples of shards, with a json: `class`, the name of their `cls`, or `references`, the lines of `txt`."""

    def __init__(self, shards: Shards, names: Sequence[str] | None) -> None:
        self.shards, self.names = shards, names
        self.place = shards.place

    def __iter__(self) -> Iterator[Sample]:
        for sample in self.shards:
            yield {**sample, "json": json.dumps(self._about(sample)).encode()}

    def _about(self, sample: Sample) -> dict[str, Any]:
        if self.names is None:
            lines = bytes(sample.get("txt", b"")).decode(errors="replace").splitlines()
            return {"references": [line for line in lines if line.strip()]}
        label = number(bytes(sample.get("cls", b"")).decode(errors="replace").strip())
        if label is None or label >= len(self.names):
            return {}  # without a class it is not scored, and said to be so
        return {"class": self.names[label], "number": label}

    def fingerprint(self) -> str:
        """That of the shards, and the names."""
        return "\n".join([fingerprint(self.shards), *(self.names or ())])
