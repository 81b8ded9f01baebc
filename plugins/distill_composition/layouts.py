"""Published sets, each read from your own copy: what a file's line becomes is a sample of `composition`.

Pictures are the fields `image_0` and `image_1`, captions `caption_0` and `caption_1` of the json.
"""

from __future__ import annotations

import csv
import json
import re
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill_core import ComponentConfig, DataError, Sample, stamps
from distill_layouts.files import folder, inside, is_there
from distill_layouts.scored import ScoredSource

PICTURES = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True)
class Item:
    """One sample to be: its pictures' files and its captions, each in the order of the fields."""

    key: str
    images: tuple[Path, ...]
    captions: tuple[str, ...]


class Items:
    """Samples read anew each time. A picture that is not there has no field; the task skips the sample and names it."""

    def __init__(self, items: Sequence[Item]) -> None:
        self.items = items
        self.place = str(items[0].images[0].parent) if items else ""

    def __len__(self) -> int:
        return len(self.items)

    def fingerprint(self) -> str:
        """Captions, and sizes and times of change of the pictures."""
        captions = json.dumps([(item.key, item.captions) for item in self.items])
        return f"{captions}\n{stamps(path for item in self.items for path in item.images)}"

    def __iter__(self) -> Iterator[Sample]:
        for item in self.items:
            captions = {f"caption_{i}": caption for i, caption in enumerate(item.captions)}
            pictures = {f"image_{i}": _bytes(path) for i, path in enumerate(item.images)}
            fields = {field: data for field, data in pictures.items() if data is not None}
            contents = zip(item.images, pictures.values(), strict=True)
            where = ", ".join(f"{path}{' (missing)' if data is None else ''}" for path, data in contents)
            yield {"__key__": item.key, "__url__": where, "json": json.dumps(captions).encode(), **fields}


def _bytes(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


class CopyConfig(ComponentConfig):
    """What all of them ask."""

    split: str = "test"
    """The split that it is; tasks are left out on any other."""


class _Copy(ScoredSource):
    """Base: items by set."""

    def scored(self) -> dict[str, Iterable[Sample]]:
        """Its items, read anew each time."""
        return {name: Items(items) for name, items in self.items().items()}

    @abstractmethod
    def items(self) -> dict[str, list[Item]]:
        """The items by set."""


class SugarCrepeConfig(CopyConfig):
    """Where the copy is."""

    annotations: str
    """Folder of `add_att.json`, `replace_obj.json`, `swap_obj.json`, ...; or one such file. Each is a set."""
    images: str
    """Folder of COCO's val2017 pictures."""


class SugarCrepe(_Copy):
    """SugarCrepe (Hsieh et al. 2023): pictures with a caption and a hard negative.

    A file is {NUMBER: {"filename": ..., "caption": ..., "negative_caption": ...}}.
    """

    name = "sugarcrepe"
    Config = SugarCrepeConfig
    examples = ({"annotations": "no such folder", "images": "val2017"},)

    def items(self) -> dict[str, list[Item]]:
        """Each file is a set."""
        annotations, images = (
            _path(self.config.annotations),
            folder(self.config.images, "the folder of the pictures"),
        )
        files = (
            sorted(folder(annotations, "a file, or the folder of the files").glob("*.json"))
            if not annotations.is_file()
            else [annotations]
        )
        if not files:
            raise DataError(f"{annotations}: no file *.json")
        items_by_file = {}
        for file in files:
            document = _json(file.read_bytes(), str(file))
            if not isinstance(document, dict) or not document:
                raise DataError(f"{file}: should be an object of entries by number")
            items_by_file[file.stem] = [
                Item(
                    f"{file.stem}-{number}",
                    (_present(images, _text(entry, "filename", f"{file}: {number!r}"), f"{file}: {number!r}"),),
                    tuple(_text(entry, field, f"{file}: {number!r}") for field in ("caption", "negative_caption")),
                )
                for number, entry in document.items()
            ]
        return items_by_file


class WinogroundConfig(CopyConfig):
    """Where the copy is."""

    root: str
    """Folder that `examples.jsonl` and the folder `images` are in."""
    by_tag: bool = False
    """Whether each `collapsed_tag` (Object, Relation, Both) is a set of its own."""


class Winoground(_Copy):
    """Winoground (Thrush et al. 2022): two pictures and two captions of the same words.

    A line of `examples.jsonl` has `id`, `image_0`, `image_1` (a picture's name, with or without its suffix),
    `caption_0`, `caption_1`.
    """

    name = "winoground"
    Config = WinogroundConfig
    examples = ({"root": "no such folder"},)

    def items(self) -> dict[str, list[Item]]:
        """One set, or one a tag."""
        expected = "examples.jsonl and images in `root`"
        root = folder(self.config.root, expected)
        file, images = root / "examples.jsonl", folder(root / "images", expected)
        items_by_type: dict[str, list[Item]] = {}
        for number, line in _lines(file):
            where = f"{file}:{number}"
            entry = _json(line, where)
            name = _text(entry, "collapsed_tag", where) if self.config.by_tag else "winoground"
            pictures = tuple(_named(images, _text(entry, field, where), where) for field in ("image_0", "image_1"))
            captions = tuple(_text(entry, field, where) for field in ("caption_0", "caption_1"))
            items_by_type.setdefault(name, []).append(Item(f"winoground-{entry.get('id', number)}", pictures, captions))
        return _not_empty(items_by_type, file)


class SvoProbesConfig(CopyConfig):
    """Where the copy is."""

    annotations: str
    """The file `svo_probes.csv`."""
    images: str
    """Folder of the pictures that you could fetch, each named by its id: `123.jpg`."""


class SvoProbes(_Copy):
    """SVO-Probes (Hendricks and Nematzadeh 2021): a sentence, a picture of it, and one that differs in one word.

    Sets are `subject`, `verb` and `object`; a row that differs in several, or in none, is left out, as published. Rows
    whose picture is not in the folder (many addresses are dead) are skipped and named.
    """

    name = "svo_probes"
    Config = SvoProbesConfig
    examples = ({"annotations": "no such file", "images": "images"},)

    def items(self) -> dict[str, list[Item]]:
        """By what the negative picture differs in."""
        file, images = _path(self.config.annotations), folder(self.config.images, "the folder of the pictures")
        kinds = {"subj_neg": "subject", "verb_neg": "verb", "obj_neg": "object"}
        files = {path.stem: path for path in sorted(images.iterdir()) if path.suffix.lower() in PICTURES}
        items_by_type: dict[str, list[Item]] = {}
        (_, head), *rows = _rows(file)
        lacking = {"sentence", "pos_image_id", "neg_image_id", *kinds} - set(head)
        if lacking:
            raise DataError(f"{file}: the first line lacks the column(s) {', '.join(sorted(lacking))}")
        for number, values in rows:
            row, where = dict(zip(head, values, strict=True)), f"{file}:{number}"
            differs = [name for column, name in kinds.items() if row[column].strip().lower() in ("true", "1")]
            ids = [row[column].strip() for column in ("pos_image_id", "neg_image_id")]
            if len(differs) == 1:
                pictures = tuple(files.get(i) or _inside(images, f"{i}.jpg", where) for i in ids)
                item = Item(f"svo-{number}", pictures, (_text(row, "sentence", where),))
                items_by_type.setdefault(differs[0], []).append(item)
        if not any(is_there(path) for items in items_by_type.values() for item in items for path in item.images):
            raise DataError(f"{images}: no picture of {file}; each is named by its id, as 123.jpg")
        return _not_empty(items_by_type, file)


class MmvpVlmConfig(CopyConfig):
    """Where the copy is."""

    root: str
    """Folder that `Questions.csv` and the folder `MLLM_VLM Images` are in."""
    template: str = "a photo of {}"
    """What a statement is put into, as the public code does."""


class MmvpVlm(_Copy):
    """MMVP-VLM (Tong et al. 2024): pairs of pictures that CLIP takes for one, with a statement each, by visual pattern.

    `Questions.csv` has a head and lines `ID,TYPE,STATEMENT`; lines 2k-1 and 2k are a pair, and its pictures are
    `MLLM_VLM Images/TYPE/ID.jpg`. Sets are the types; `image` of `composition` is the published accuracy.
    """

    name = "mmvp_vlm"
    Config = MmvpVlmConfig
    examples = ({"root": "no such folder"},)

    def items(self) -> dict[str, list[Item]]:
        expected = "Questions.csv and MLLM_VLM Images in `root`"
        root = folder(self.config.root, expected)
        file, images = root / "Questions.csv", folder(root / "MLLM_VLM Images", expected)
        _, *rows = _rows(file)
        for number, row in rows:
            if len(row) != 3 or not re.fullmatch(r"\s*[0-9]{1,9}\s*", row[0], re.ASCII):
                raise DataError(f"{file}:{number}: should be ID,TYPE,STATEMENT, got {','.join(row)[:80]!r}")
        if len(rows) % 2:
            raise DataError(f"{file}: {len(rows)} statements; they come in pairs")
        items_by_type: dict[str, list[Item]] = {}
        for (line, (one, kind, first)), (_, (other, _, second)) in zip(rows[::2], rows[1::2], strict=True):
            where = f"{file}:{line}"
            if int(one) % 2 != 1 or int(other) != int(one) + 1:
                raise DataError(f"{where}: {one} and {other} are no pair: an odd id and the next")
            pictures = tuple(_present(images, f"{kind.strip()}/{int(i)}.jpg", where) for i in (one, other))
            captions = tuple(self.config.template.replace("{}", text.strip()) for text in (first, second))
            name = kind.strip().replace("/", "-")
            items_by_type.setdefault(name, []).append(Item(f"mmvp-{one}", pictures, captions))
        return _not_empty(items_by_type, file)


def _path(name: str) -> Path:
    return Path(name).expanduser()


def _lines(file: Path) -> list[tuple[int, str]]:
    """The lines that are not blank, and the number of each. \\n alone ends one: json may hold other line breaks."""
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read: {error}") from error
    return [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def _rows(file: Path) -> Iterator[tuple[int, list[str]]]:
    """The rows of a csv with their lines' numbers, the head first; a row is one line, so that a quote that is left open
    swallows no others. Raises `DataError` with the line."""  # fmt: skip
    columns = 0
    for number, line in _lines(file):
        try:
            (row,) = csv.reader([line.removesuffix("\r")], strict=True)
        except csv.Error as error:
            raise DataError(f"{file}:{number}: not a row of a csv: {error}") from error
        columns = columns or len(row)
        if len(row) != columns:
            raise DataError(f"{file}:{number}: {len(row)} column(s), where the first line has {columns}")
        yield number, row
    if not columns:
        raise DataError(f"{file}: no entry in it")


def _json(data: str | bytes, where: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not readable json: {error}") from error


def _text(entry: Any, field: str, where: str) -> str:
    value = entry.get(field) if isinstance(entry, dict) else None
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: no text in {field!r}")
    return value


def _inside(base: Path, name: str, where: str) -> Path:
    """The file of a name that a line gives. Raises `DataError` for one that would lead out of `base`."""
    try:
        return inside(base, name)
    except ValueError as error:
        raise DataError(f"{where}: {error}") from error


def _present(base: Path, name: str, where: str) -> Path:
    if not is_there(path := _inside(base, name, where)):
        raise DataError(f"{where}: no picture {name!r} in {base}")
    return path


def _named(images: Path, name: str, where: str) -> Path:
    """A picture by its name with or without a suffix."""
    for suffix in ("", *PICTURES):
        if is_there(path := _inside(images, f"{name}{suffix}", where)):
            return path
    raise DataError(f"{where}: no picture {name!r} in {images}")


def _not_empty(items: dict[str, list[Item]], file: Path) -> dict[str, list[Item]]:
    if not items:
        raise DataError(f"{file}: no entry in it")
    return items
