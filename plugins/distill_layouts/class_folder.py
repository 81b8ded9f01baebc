"""Labelled pictures: a folder for each class."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from distill_core import ComponentConfig, DataError, Shard
from distill_layouts.files import PICTURES, document, folder, printable, walk
from distill_layouts.shards import NamedSplits, check_first, listed, picture_row
from distill_tasks.prompts import read_lines


class ClassFolderConfig(ComponentConfig):
    """Options of `class_folder`. At least one split is named."""

    test: str | None = None
    """The folder of the split `test`; of ImageNet the validation pictures, one folder a synset."""
    validation: str | None = None
    """The folder of the split `validation`."""
    train: str | None = None
    """The folder of the split `train`, to train on and for probes to learn from."""
    names: str | None = None
    """A file with the classes' names: `FOLDER name in words` a line, a name a line in the folders' order, or json
    {FOLDER: name}. Null takes the folders' names, with _ for a space."""


class ClassFolder(NamedSplits):
    """Pictures in a folder for each class (CLASS/.../x.jpg), as ImageNet's: for methods of images alone, for zero-shot
    classification and for probes. Samples' json has `class` and `folder`."""

    name = "class_folder"
    Config = ClassFolderConfig
    examples = ({"test": "no-such-folder/val", "names": "no-such-folder/names.txt"},)
    layout = "a folder for each class in it, as goldfish/1.jpg"

    def sets(self, split: str) -> dict[str, list[Shard]]:
        """One set, of the folder's name."""
        if split not in self.splits(self.config):
            return {}
        base = folder(getattr(self.config, split), self.layout).absolute()
        classes = sorted(path.name for path in base.iterdir() if path.is_dir() and not path.name.startswith("."))
        if not classes:
            raise DataError(f"{base}: holds no folder; expected {self.layout}")
        shards = listed(str(base), _rows(base, _names(self.config.names, classes)))
        check_first(shards, base, self.layout)
        return {base.name: shards}


def _rows(base: Path, names: Mapping[str, str]) -> Iterator[Mapping[str, Any]]:
    for path in walk(base):
        if path.suffix.lower() in PICTURES and (name := path.parts[0]) in names:
            yield picture_row(str(path), base / path, {"class": names[name], "folder": printable(name)})


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
