"""Samples that lie as files: a picture is read when somebody asks for it, and not before."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from distill_core import BadSample, DataError, DataSource, Sample, Shard, stamps

PICTURES = {".jpg": "jpg", ".jpeg": "jpg", ".png": "png", ".webp": "webp"}
"""Suffix -> field."""
LOOK = 20
"""Listed files that are looked for before all are said to be missing."""


class FileSample(Mapping[str, Any]):
    """A picture's file and what is known of it. Asking for the picture reads it, and raises `BadSample` if it cannot.

    Fields: the picture by its suffix (`jpg` where that is unknown), `json` (bytes), `__key__`, `__url__`.
    """

    def __init__(self, key: str, path: Path, about: Mapping[str, Any]) -> None:
        self.key, self.path, self.about = key, path, about
        self.field = PICTURES.get(path.suffix.lower(), "jpg")

    def __getitem__(self, name: str) -> Any:
        if name == "__key__":
            return self.key
        if name == "__url__":
            return str(self.path)
        if name == "json":
            return json.dumps(self.about).encode()
        if name == self.field:
            return read(self.path)
        raise KeyError(name)

    def __contains__(self, name: object) -> bool:
        return name in tuple(self)

    def __iter__(self) -> Iterator[str]:
        yield from ("__key__", "__url__", self.field, "json")

    def __len__(self) -> int:
        return 4


def read(path: Path) -> bytes:
    """The bytes of a file. Raises `BadSample`."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadSample(f"cannot be read: {error.strerror or error}") from error


def inside(base: Path, name: str) -> Path:
    """The file that an annotation names, from its folder. Raises `ValueError` where the name leads out of it.

    Links of the folder's are followed: they are the user's, not the annotation's.
    """
    if PurePath(name).is_absolute() or ".." in PurePath(name).parts or b"\0" in os.fsencode(name):
        raise ValueError(f"{name!r} is not a path inside {base}")
    return base / name


def is_there(path: Path) -> bool:
    """Whether it is a file; no name is too long to ask."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def number(text: str) -> int | None:
    """A whole number in plain digits, or None."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 19 else None


class FileSamples(Sequence[Sample]):
    """Samples in order; `place` is where they lie, and `beside` a folder of more files that they read."""

    def __init__(self, place: str, samples: Sequence[FileSample], beside: Path | None = None) -> None:
        self.place, self._samples, self._beside = place, samples, beside

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, i: Any) -> Any:
        return self._samples[i]

    def fingerprint(self) -> str:
        """The files' sizes and times of change, and what is known of each."""
        about = json.dumps([(sample.key, sample.about) for sample in self._samples])
        more = sorted(self._beside.iterdir()) if self._beside is not None else []
        return f"{about}\n{stamps([*(sample.path for sample in self._samples), *more])}"


class FileSource(DataSource):
    """Base of sources without shards: evaluations read them, nothing can be trained on them."""

    trainable = False

    def sets(self, split: str) -> dict[str, list[Shard]]:
        return {}


class NamedSplits(FileSource):
    """Base of those whose options `train`, `validation` and `test` name a place, or null."""

    @classmethod
    def splits(cls, config: Any) -> tuple[str, ...]:
        """Those whose place is named."""
        return tuple(split for split in ("train", "validation", "test") if getattr(config, split) is not None)


def folder(path: str | Path, layout: str) -> Path:
    """A folder that is there. Raises `DataError`, with the layout that was expected."""
    expanded = Path(path).expanduser()
    if not expanded.is_dir():
        raise DataError(f"{path}: no such folder; expected {layout}")
    return expanded


def document(path: Path, layout: str) -> Any:
    """A json file. Raises `DataError`."""
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); expected {layout}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not readable json ({error}); expected {layout}") from error


def some_are_there(samples: Sequence[FileSample], where: Path, layout: str) -> None:
    """Raises `DataError` where none of the first files is there: a wrong folder, and not a broken file."""
    if not samples:
        raise DataError(f"{where}: holds no sample; expected {layout}")
    if not any(is_there(sample.path) for sample in samples[:LOOK]):
        raise DataError(f"{where}: lacks the pictures, as {samples[0].path}; expected {layout}")
