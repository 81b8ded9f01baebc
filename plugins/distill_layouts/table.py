"""Tables of samples: CSV, TSV, JSON lines, parquet, and Hugging Face data sets on disk."""

from __future__ import annotations

import glob
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from distill_core import ComponentConfig, DataError, Sample, Shard
from distill_layouts.arrow import ArrowTable, ParquetTable
from distill_layouts.files import FileSample, document, folder, inside, picture_field, printable
from distill_layouts.shards import NamedSplits, check_first, shards_of
from distill_layouts.tables import BadRow, CsvTable, JsonTable, TableFile

Files = str | tuple[str, ...]
KINDS: dict[str, Callable[[Path, str | None, Sequence[str]], TableFile]] = {
    ".csv": lambda path, key, read: CsvTable(path, key),
    ".tsv": lambda path, key, read: CsvTable(path, key),
    ".jsonl": lambda path, key, read: JsonTable(path, key),
    ".parquet": ParquetTable,
    ".arrow": ArrowTable,
}
LAYOUT = (
    ".csv or .tsv with a line of column names, .jsonl, .parquet, .arrow, or a folder that Hugging Face's "
    "`save_to_disk` has written"
)


class TableConfig(ComponentConfig):
    """Options of `table`. At least one split is named."""

    train: Files | None = None
    """The table to train on: a file, several, or a pattern with wildcards."""
    validation: Files | None = None
    """The table of the split `validation`."""
    test: Files | None = None
    """The table of the split `test`."""
    images: str | None = None
    """The folder that paths start from, and stay inside of; null is that of the table."""
    image: str = "image"
    """The column of the file's path, or of its bytes."""
    caption: Annotated[tuple[str, ...], Field(min_length=1)] | str | None = "caption"
    """The column or columns of the captions; one may hold a list of texts. Null for samples without any."""
    key: str | None = None
    """The column of the sample's name; null takes the file's path, or for bytes the row's number."""
    fields: dict[str, str] = {}  # noqa: RUF012
    """Further fields of the sample's json and the columns that they are read from, as {class: label}."""

    @model_validator(mode="after")
    def _has_table(self) -> TableConfig:
        if self.train is None and self.validation is None and self.test is None:
            raise ValueError("names no table: give `train`, `validation` or `test`")
        return self

    @property
    def captions(self) -> tuple[str, ...]:
        """The columns of captions."""
        return (self.caption,) if isinstance(self.caption, str) else self.caption or ()

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns that are read."""
        key = () if self.key is None else (self.key,)
        return tuple(dict.fromkeys((self.image, *self.captions, *key, *self.fields.values())))


class Table(NamedSplits):
    """A row a sample: a picture's path or bytes, captions, and what else its json should hold.

    Rows of one key (of one picture, where no key is named) are one sample with the captions of all of them. Its json
    has each column of captions under its name, and `references`, all captions. Of a Hugging Face `DatasetDict`, a split
    is the one of this name.
    """

    name = "table"
    Config = TableConfig
    examples = (
        {"train": "no-such-folder/train.csv"},
        {"train": "no-such-folder/train-*.parquet", "caption": ["short", "long"], "key": "id"},
        {"test": "no-such-folder/pairs.jsonl", "caption": None, "fields": {"class": "label"}},
    )

    def sets(self, split: str) -> dict[str, list[Shard]]:
        if split not in self.splits(self.config):
            return {}
        patterns = getattr(self.config, split)
        patterns = (patterns,) if isinstance(patterns, str) else patterns
        paths = [path for pattern in patterns for path in _files(pattern, split)]
        shards: list[Shard] = []
        for path in paths:
            base = path.parent if self.config.images is None else folder(self.config.images, "the files of the table")
            table = self._table(path)
            rows = RowToSample(self.config, base.absolute(), str(path))
            shards += shards_of(table, str(path), rows)
        check_first(shards, paths[0], "the files that its rows name below the folder `images`")
        if self.config.captions:
            self._check_captions(shards, paths[0])
        return {paths[0].stem if len(paths) == 1 else paths[0].parent.name: shards}

    def _table(self, path: Path) -> TableFile:
        """Raises `DataError` where it is no table, and where it lacks a column."""
        config = self.config
        if path.suffix not in KINDS:
            raise DataError(f"{path}: not a table: expected {LAYOUT}")
        table = KINDS[path.suffix](path, config.key or config.image, config.columns)
        try:
            have = table.columns()
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror or error}); expected {LAYOUT}") from error
        if missing := [name for name in config.columns if name not in have]:
            raise DataError(
                f"{path}:1: no column {', '.join(map(repr, missing))} (there are: {', '.join(have) or 'none'}); name "
                "them with the options `image`, `caption`, `key` and `fields`"
            )
        return table

    def _check_captions(self, shards: Sequence[Shard], path: Path) -> None:
        """Raises `DataError` where the first shard has none."""
        first = shards[0]
        if not any(json.loads(first[i].get("json", "{}")).get("references") for i in range(len(first))):
            columns = ", ".join(self.config.captions)
            raise DataError(
                f"{path}: no caption in the first {len(first)} samples (column {columns}); name its column with the "
                "option `caption`, or give `caption: null` for samples without any"
            )


@dataclass(frozen=True)
class RowToSample:
    """The rows of a sample -> its `FileSample`."""

    config: TableConfig
    base: Path
    """The folder that paths start from."""
    table: str

    def __call__(self, rows: list[tuple[int, Mapping[str, Any]]]) -> Sample:
        """Raises `BadRow`."""
        config = self.config
        line, row = rows[0]
        value = row.get(config.image)
        key = self._key(line, row, value)
        image, url = self._image(line, value, key)
        for other, again in rows[1:]:
            if again.get(config.image) != value:
                raise BadRow(f"its key is also that of line {other}, which has another {config.image}", line, key)
        captions: dict[str, list[str]] = {
            column: list(dict.fromkeys(text for n, row in rows for text in _texts(row.get(column), column, n, key)))
            for column in config.captions
        }
        about: dict[str, Any] = {name: row.get(column) for name, column in config.fields.items()}
        if config.captions:
            about |= captions | {"references": [text for texts in captions.values() for text in texts]}
        try:
            encoded = json.dumps(about).encode()
        except TypeError as error:
            raise BadRow(f"what `fields` names cannot be written as json: {error}", line, key) from error
        field = picture_field(image) if isinstance(image, Path) else "jpg"
        return FileSample(key, url, {field: image, "json": encoded} if about else {field: image})

    def _key(self, line: int, row: Mapping[str, Any], image: Any) -> str:
        if self.config.key is not None:
            value = row.get(self.config.key)
            if isinstance(value, str | int) and str(value):
                return printable(str(value))
            raise BadRow(f"no key in the column {self.config.key!r}", line)
        return printable(image) if isinstance(image, str) and image else f"{Path(self.table).name}:{line}"

    def _image(self, line: int, value: Any, key: str) -> tuple[Path | bytes, str]:
        """The file or its bytes, and where it is. Hugging Face's {bytes, path} has either."""
        if isinstance(value, Mapping):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes) and value:
            return value, f"{self.table}:{line}"
        if not isinstance(value, str) or not value:
            raise BadRow(f"no path and no bytes in the column {self.config.image!r}", line, key)
        try:
            path = inside(self.base, value)
        except ValueError as error:
            raise BadRow(f"{error}; paths start from the folder `images`", line, key) from error
        return path, printable(str(path))


def _texts(value: Any, column: str, line: int, key: str) -> list[str]:
    """The captions of a column, where null, NaN and "" are none. Raises `BadRow` for what else is no text."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return []
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        raise BadRow(f"the column {column!r} holds something other than text", line, key)
    return [text for text in texts if text.strip()]


def _files(pattern: str, split: str) -> list[Path]:
    """The files of a table. Raises `DataError`."""
    path = Path(pattern).expanduser()
    if not path.is_dir():
        paths = [Path(name) for name in sorted(glob.glob(str(path)))] if glob.has_magic(pattern) else [path]
        if not paths:
            raise DataError(f"{pattern}: no file matches. Check data.source; expected {LAYOUT}")
        return paths
    if (splits := path / "dataset_dict.json").is_file():
        names = document(splits, '{"splits": [...]}').get("splits", [])
        if split not in names:
            raise DataError(f"{path}: has the splits {', '.join(names)}; name one's folder, as {path / 'train'}")
        path = path / split
    state = path / "state.json"
    if not state.is_file():
        raise DataError(f"{path}: is a folder; name the files in it, as {path / '*.parquet'}; expected {LAYOUT}")
    layout = '{"_data_files": [{"filename": ...}]}'
    try:
        return [inside(path, str(file["filename"])) for file in document(state, layout)["_data_files"]]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{state}: not what `save_to_disk` writes ({error!r}); expected {layout}") from error
