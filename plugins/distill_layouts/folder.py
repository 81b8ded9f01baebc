"""Folders of samples: the files of one name are one sample, as a picture and the caption beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path, PurePath
from typing import Annotated, Any

from pydantic import Field, model_validator

from distill_core import ComponentConfig, Shard
from distill_layouts.files import PICTURES, folder, printable, walk
from distill_layouts.shards import ListedFiles, NamedSplits, check_first, listed

TEXTS = ("json", "txt")
"""Fields that belong to a file of a sample: alone they are a bad one."""


class FolderConfig(ComponentConfig):
    """Options of `folder`. At least one split is named."""

    train: str | None = None
    """The folder to train on."""
    validation: str | None = None
    """The folder of the split `validation`."""
    test: str | None = None
    """The folder of the split `test`."""
    suffixes: Annotated[tuple[str, ...], Field(min_length=1)] = tuple(PICTURES)
    """A file with one of these suffixes is a sample; the files that differ from it in their suffix alone are its
    further fields."""

    @model_validator(mode="after")
    def _has_folder(self) -> FolderConfig:
        if self.train is None and self.validation is None and self.test is None:
            raise ValueError("names no folder: give `train`, `validation` or `test`")
        return self


class Folder(NamedSplits):
    """Files in a folder, at any depth: x.jpg with its caption in x.txt, or its captions in x.json.

    A sample's key is its path in the folder without the suffix, its fields are the suffixes. Hidden files are left out;
    a txt or json without a picture is a bad sample, which is counted and named.
    """

    name = "folder"
    Config = FolderConfig
    examples = ({"train": "no-such-folder/photos"}, {"test": "no-such-folder/sounds", "suffixes": [".wav", ".flac"]})

    def sets(self, split: str) -> dict[str, list[Shard]]:
        if split not in self.splits(self.config):
            return {}
        suffixes = tuple(suffix.lower() for suffix in self.config.suffixes)
        layout = f"files {', '.join(suffixes)} in it, as x{suffixes[0]} and x.txt"
        base = folder(getattr(self.config, split), layout).absolute()
        shards = listed(str(base), _rows(base, suffixes), ListedFiles(base))
        check_first(shards, base, layout)
        return {base.name: shards}


def _rows(base: Path, suffixes: tuple[str, ...]) -> Iterator[Mapping[str, Any]]:
    def stem(path: PurePath) -> PurePath:
        return path.with_suffix("")

    for here, in_folder in groupby(walk(base), key=lambda path: path.parent):
        # files of one name need not stand together in the order of their paths: a.b.jpg is between a.jpg and a.txt
        for name, group in groupby(sorted(in_folder, key=stem), key=stem):
            files = list(group)
            own = [path for path in files if path.suffix.lower() in suffixes]
            fields = {_field(path): str(path) for path in (*own, *(path for path in files if path not in own))}
            key = printable(str(name))
            if len({_field(path) for path in own}) < len(own):
                names = ", ".join(printable(path.name) for path in own)
                yield {"key": key, "reason": f"its field is that of several files: {names}"}
            elif own:
                yield {"key": key, "files": fields}
            elif fields.keys() & {*TEXTS}:
                yield {"key": key, "reason": f"only {', '.join(sorted(fields))} of this name are in {here}"}


def _field(path: PurePath) -> str:
    suffix = path.suffix.lower()
    return PICTURES.get(suffix, suffix.removeprefix("."))
