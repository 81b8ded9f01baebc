"""Samples that lie as files: a file is read when somebody asks for its field, and not before."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

from distill_core import BadSample, DataError

PICTURES = {".jpg": "jpg", ".jpeg": "jpg", ".png": "png", ".webp": "webp", ".gif": "jpg", ".bmp": "jpg"}
"""Suffix -> field. Decoders go by the content; image augmentations look for these fields."""


class FileSample(Mapping[str, Any]):
    """Fields that are files, or bytes. Asking for a file reads it, and raises `BadSample` where it cannot be read."""

    def __init__(self, key: str, url: str, fields: Mapping[str, Path | bytes]) -> None:
        self._identity = {"__key__": key, "__url__": url}
        self.fields = fields

    def __getitem__(self, name: str) -> Any:
        if name in self._identity:
            return self._identity[name]
        value = self.fields[name]
        return read(value) if isinstance(value, Path) else value

    def __contains__(self, name: object) -> bool:
        return name in self._identity or name in self.fields

    def __iter__(self) -> Iterator[str]:
        yield from self._identity
        yield from self.fields

    def __len__(self) -> int:
        return len(self._identity) + len(self.fields)

    @property
    def paths(self) -> list[Path]:
        """Its files."""
        return [value for value in self.fields.values() if isinstance(value, Path)]


def picture_field(path: PurePath) -> str:
    """The field by the suffix, `jpg` where that is unknown."""
    return PICTURES.get(path.suffix.lower(), "jpg")


def printable(name: str) -> str:
    r"""Bytes of a file's name that are not UTF-8 as `\xff`, so that it may stand in any text."""
    return os.fsencode(name).decode("utf-8", "backslashreplace") if not name.isascii() else name


def read(path: Path) -> bytes:
    """The bytes of a file. Raises `BadSample`."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadSample(f"{printable(str(path))}: cannot be read: {error.strerror or error}") from error


def inside(base: Path, name: str) -> Path:
    """The file that an annotation names, from its folder. Raises `ValueError` where the name leads out of it.

    Links of the folder's are followed: they are the user's, not the annotation's.
    """
    path = PurePath(name)
    try:
        encoded = os.fsencode(name)
    except UnicodeEncodeError:
        encoded = b"\0"
    if ".." in path.parts or b"\0" in encoded or (path.is_absolute() and not path.is_relative_to(base)):
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


def walk(base: Path) -> Iterator[Path]:
    """Every file below a folder in the order of its path, relative to it, without hidden ones. Links are followed, a
    folder that stands below itself once. Raises `DataError`."""

    def below(folder: Path, above: frozenset[tuple[int, int]]) -> Iterator[Path]:
        try:
            status = os.stat(folder)
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise DataError(f"{printable(str(folder))}: cannot be listed: {error.strerror or error}") from error
        here = (status.st_dev, status.st_ino)
        if here in above:
            return
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from below(folder / entry.name, above | {here})
            else:
                yield (folder / entry.name).relative_to(base)

    yield from below(base, frozenset())
