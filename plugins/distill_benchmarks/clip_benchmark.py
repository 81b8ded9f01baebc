"""The WebDataset form of CLIP-benchmark."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from distill_core import ComponentConfig, DataError, DataSource, Sample, Shard, TarShard, Unusable
from distill_layouts.files import folder, number
from distill_tasks.prompts import plain_lines, read_lines


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
    layout = "test/nshards.txt, test/0.tar, ... and classnames.txt (or dataset_type.txt: retrieval) in it"
    folders = {"train": ("train",), "validation": ("validation", "valid", "val"), "test": ("test",)}  # noqa: RUF012

    def sets(self, split: str) -> dict[str, list[Shard]]:
        """One set, of the folder's name; {} where the split has no folder. Raises `DataError`."""
        base = folder(self.config.folder, self.layout)
        part = next((base / name for name in self.folders.get(split, ()) if (base / name).is_dir()), None)
        if part is None:
            return {}
        kind = " ".join(read_lines(base / "dataset_type.txt", "a word")) if (base / "dataset_type.txt").exists() else ""
        if kind not in ("", "retrieval", "classification"):
            raise DataError(f"{base}: of a dataset of type {kind!r} nothing is known; only of classes and retrieval")
        classes = None if kind == "retrieval" else plain_lines(base / "classnames.txt", "the name of a class a line")
        return {base.name: [NumberedShard(path, classes) for path in _shards(part, self.layout)]}


def _shards(part: Path, layout: str) -> list[Path]:
    """Those that nshards.txt counts, or all there are."""
    counted = part / "nshards.txt"
    if not counted.is_file():
        names = sorted(part.glob("*.tar"), key=lambda path: (len(path.name), path.name))
        if not names:
            raise DataError(f"{part}: holds no shard; expected {layout}")
        return names
    word = read_lines(counted, "the number of shards")[0]
    if (count := number(word)) is None:
        raise DataError(f"{counted}: should hold the number of shards, not {word!r}")
    return [part / f"{i}.tar" for i in range(count)]


class NumberedShard(TarShard):
    """A shard whose samples have a json: `class`, the name of their `cls`, or `references`, the lines of `txt`."""

    def __init__(self, path: Path, classes: Sequence[str] | None) -> None:
        super().__init__(path)
        self.classes = classes

    def __getitem__(self, number: int) -> Sample:
        return self._described(super().__getitem__(number))

    def __iter__(self) -> Iterator[Sample]:
        return map(self._described, super().__iter__())

    def fingerprint(self) -> str:
        """That of the file, and the names."""
        return "\n".join([super().fingerprint(), *(self.classes or ())])

    def _described(self, sample: Sample) -> Sample:
        if isinstance(sample, Unusable):
            return sample
        return {**sample, "json": json.dumps(self._about(sample)).encode()}

    def _about(self, sample: Sample) -> dict[str, Any]:
        if self.classes is None:
            lines = bytes(sample.get("txt", b"")).decode(errors="replace").splitlines()
            return {"references": [line for line in lines if line.strip()]}
        label = number(bytes(sample.get("cls", b"")).decode(errors="replace").strip())
        if label is None or label >= len(self.classes):
            return {}  # without a class it is not scored, and said to be so
        return {"class": self.classes[label], "number": label}
