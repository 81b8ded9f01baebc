"""What is joined to samples by their keys: a table or embeddings, in an SQLite file, so that memory stays flat."""

from __future__ import annotations

import csv
import io
import json
import sqlite3
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np

from distill_core import UserError, counted, progress_bar, require_extra

EXAMPLES = 20
"""Keys that a report names of each kind."""
TABLES = (".jsonl", ".csv", ".tsv", ".parquet")
ARRAYS = (".npy", ".safetensors")
NUMPY = ("F64", "F32", "F16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL")
"""Types of safetensors that numpy has too."""


class Reader(ABC):
    """A file with keys: what stands at each."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What tells it from other rows, as json."""

    @abstractmethod
    def rows(self) -> Iterator[tuple[str, Any]]:
        """Key and what is kept of it, as json. Raises `UserError` with the line."""

    @abstractmethod
    def fields(self, value: Any) -> dict[str, Any]:
        """Name -> what the sample gets: an array, or anything that json can hold."""


def stamp(path: Path) -> list[Any]:
    """A file's name, size and time of change."""
    status = path.stat()
    return [path.name, status.st_size, status.st_mtime_ns]


class Table(Reader):
    """Rows with a column of keys; a column of lists of floats (of parquet) becomes arrays."""

    def __init__(self, path: Path, key: str, columns: Sequence[str] | None) -> None:
        super().__init__(path)
        self.key, self.columns = key, columns
        self._arrays: dict[str, Any] = {}

    def identity(self) -> dict[str, Any]:
        return {"new": stamp(self.path), "key": self.key, "columns": self.columns}

    def rows(self) -> Iterator[tuple[str, Any]]:
        for place, row in self._rows():
            if row.get(self.key) is None:
                known = ", ".join(map(str, row))
                raise UserError(f"{place}: has no {self.key!r} (it has: {known}). Name the column of keys by --key")
            missing = [column for column in self.columns or () if column not in row]
            if missing:
                raise UserError(f"{place}: has no column {missing[0]!r}; see --columns")
            columns = self.columns or [column for column in row if column != self.key]
            yield str(row[self.key]), {column: row[column] for column in columns}

    def _rows(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        if self.path.suffix == ".parquet":
            yield from self._parquet()
            return
        with open(self.path, encoding="utf-8-sig", newline="") as file:
            try:
                yield from self._json_lines(file) if self.path.suffix == ".jsonl" else self._csv(file)
            except UnicodeDecodeError as error:
                raise UserError(f"{self.path}: not UTF-8: {error.reason}. Write it as UTF-8") from error

    def _json_lines(self, file: io.TextIOBase) -> Iterator[tuple[str, Mapping[str, Any]]]:
        for number, line in enumerate(file, start=1):
            place = f"{self.path}:{number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"{place}: not json: {error}") from error
            if not isinstance(row, dict):
                raise UserError(f"{place}: must be an object with a key, as {{{json.dumps(self.key)}: ...}}")
            yield place, row

    def _csv(self, file: io.TextIOBase) -> Iterator[tuple[str, Mapping[str, Any]]]:
        csv.field_size_limit(sys.maxsize)  # captions may be long
        reader = csv.DictReader(file, delimiter="\t" if self.path.suffix == ".tsv" else ",", strict=True)
        try:
            for row in reader:
                place = f"{self.path}:{reader.line_num}"
                if None in row or None in row.values():
                    columns = len(reader.fieldnames or ())
                    raise UserError(f"{place}: has not as many columns as the first line, {columns}")
                yield place, row
        except csv.Error as error:
            raise UserError(f"{self.path}:{reader.line_num}: {error}") from error

    def _parquet(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        parquet = require_extra("pyarrow.parquet", "parquet")
        types = require_extra("pyarrow", "parquet").types
        file = parquet.ParquetFile(self.path)
        for column in file.schema_arrow:
            kind = column.type
            if (types.is_list(kind) or types.is_fixed_size_list(kind)) and types.is_floating(kind.value_type):
                self._arrays[column.name] = np.dtype(kind.value_type.to_pandas_dtype())
        number = 0
        for batch in file.iter_batches(1024):
            for row in batch.to_pylist():
                number += 1
                yield f"{self.path}: row {number}", row

    def fields(self, value: Any) -> dict[str, Any]:
        return {
            name: np.asarray(one, self._arrays[name]) if name in self._arrays else one for name, one in value.items()
        }

    def prepare(self) -> None:
        """Which columns are arrays, where the rows were read by another process."""
        if self.path.suffix == ".parquet":
            next(self._parquet(), None)


class Arrays(Reader):
    """Rows of arrays, and a file with the key of each, a line each."""

    def __init__(self, path: Path, keys: Path, field: str) -> None:
        super().__init__(path)
        self.keys = keys
        if path.suffix == ".npy":
            try:
                self._tensors: dict[str, Any] = {field: np.load(path, mmap_mode="r", allow_pickle=False)}
            except (ValueError, EOFError) as error:
                raise UserError(f"{path}: not a numpy array: {error}") from error
        else:
            from safetensors import SafetensorError, safe_open

            try:
                file: Any = safe_open(path, framework="np")
            except SafetensorError as error:
                raise UserError(f"{path}: not a safetensors file: {error}") from error
            self._tensors = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        if not keys.is_file():
            raise UserError(f"{keys}: does not exist: name the file with the rows' keys, one a line, by --keys")
        with open(keys, encoding="utf-8") as lines:
            self._count = sum(1 for _ in lines)
        for name, tensor in self._tensors.items():
            shape = self._shape(tensor)
            if not shape or shape[0] != self._count:
                raise UserError(
                    f"{path}: {name} is of shape {list(shape)}, and {keys} has {counted(self._count, 'key')}"
                )
            if hasattr(tensor, "get_dtype") and tensor.get_dtype() not in NUMPY:
                raise UserError(
                    f"{path}: {name} is of type {tensor.get_dtype()}, which numpy has not: write F32 or F16"
                )

    def identity(self) -> dict[str, Any]:
        return {"new": stamp(self.path), "keys": stamp(self.keys), "fields": sorted(self._tensors)}

    @staticmethod
    def _shape(tensor: Any) -> Sequence[int]:
        shape: Sequence[int] = tensor.get_shape() if hasattr(tensor, "get_shape") else tensor.shape
        return shape

    def rows(self) -> Iterator[tuple[str, Any]]:
        with open(self.keys, encoding="utf-8") as lines:
            for number, line in enumerate(lines):
                yield line.rstrip("\n"), number

    def fields(self, value: Any) -> dict[str, Any]:
        return {name: np.asarray(tensor[value : value + 1][0]) for name, tensor in self._tensors.items()}


class Partners:
    """Sample key -> its rows, and which keys have met a sample."""

    def __init__(self, file: Path, reader: Reader, identity: Mapping[str, Any]) -> None:
        """`file` is the database; `identity` tells whether it holds these rows already."""
        self.file, self.reader = file, reader
        self._identity = json.dumps(identity, sort_keys=True)
        self._lock = threading.Lock()
        self._met: list[tuple[str]] = []
        self._alone: list[tuple[str]] = []
        self._database = self._connection()

    def _connection(self) -> sqlite3.Connection:
        return sqlite3.connect(self.file, check_same_thread=False, isolation_level=None)

    def is_built(self) -> bool:
        """Whether a process before this one has read the rows."""
        try:
            row = self._database.execute("SELECT identity FROM built").fetchone()
        except sqlite3.Error:  # none, or one that was being made
            return False
        return row is not None and row[0] == self._identity

    def build(self, several: str) -> None:
        """Read the rows. Of a key's `several` rows `first` keeps the first, `list` all; `error` raises `UserError`."""
        self._database.close()
        self.file.unlink(missing_ok=True)
        self._database = database = self._connection()
        # it is made again if the process dies meanwhile
        database.execute("PRAGMA journal_mode = OFF")
        database.execute("PRAGMA synchronous = OFF")
        database.execute("CREATE TABLE rows (key TEXT PRIMARY KEY, value TEXT, met INTEGER) WITHOUT ROWID")
        database.execute("CREATE TABLE repeated (key TEXT PRIMARY KEY) WITHOUT ROWID")
        database.execute("CREATE TABLE alone (key TEXT PRIMARY KEY) WITHOUT ROWID")
        database.execute("BEGIN")
        with progress_bar(None, f"reading {self.reader.path.name}") as advance:
            for key, value in self.reader.rows():
                written = json.dumps([value], default=str)
                if not database.execute("INSERT OR IGNORE INTO rows VALUES (?, ?, 0)", (key, written)).rowcount:
                    database.execute("INSERT OR IGNORE INTO repeated VALUES (?)", (key,))
                    if several == "list":
                        (before,) = database.execute("SELECT value FROM rows WHERE key = ?", (key,)).fetchone()
                        both = f"{before[:-1]}, {written[1:]}"
                        database.execute("UPDATE rows SET value = ? WHERE key = ?", (both, key))
                advance()
        if several == "error" and (count := self._count("repeated")):
            raise UserError(
                f"{self.reader.path}: {counted(count, 'key')} {'stands' if count == 1 else 'stand'} more than once, as "
                f"{self._some('repeated')[0]!r}: choose --several first or list"
            )
        database.execute("COMMIT")
        database.execute("PRAGMA journal_mode = DELETE")
        database.execute("PRAGMA synchronous = NORMAL")
        database.execute("CREATE TABLE built AS SELECT ? AS identity", (self._identity,))

    def of(self, key: str) -> tuple[str, list[dict[str, Any]]] | None:
        """The key that a sample's stands for, and the fields of each of its rows; None for none. Any thread may ask."""
        for written in dict.fromkeys((key, unquote(key))):  # `distill data pack` writes some letters as %2E
            with self._lock:
                row = self._database.execute("SELECT value FROM rows WHERE key = ?", (written,)).fetchone()
            if row is not None:
                return written, [self.reader.fields(value) for value in json.loads(row[0])]
        return None

    def mark(self, key: str | None, sample: str) -> None:
        """Remember until `commit` that a sample was written with the rows of `key`, or without any."""
        (self._alone if key is None else self._met).append((sample if key is None else key,))

    def commit(self) -> None:
        """Keep what was marked."""
        with self._lock:
            self._database.execute("BEGIN")
            self._database.executemany("UPDATE rows SET met = 1 WHERE key = ?", self._met)
            self._database.executemany("INSERT OR IGNORE INTO alone VALUES (?)", self._alone)
            self._database.execute("COMMIT")
        self._met, self._alone = [], []

    def counts(self) -> dict[str, Any]:
        """Keys of either side without a partner, and keys of several rows; some of each by name."""
        return {
            "keys": self._count("rows"),
            "keys_without_sample": self._count("rows WHERE met = 0"),
            "samples_without_key": self._count("alone"),
            "repeated_keys": self._count("repeated"),
            "examples": {
                "keys_without_sample": self._some("rows WHERE met = 0"),
                "samples_without_key": self._some("alone"),
                "repeated_keys": self._some("repeated"),
            },
        }

    def close(self, *, remove: bool = False) -> None:
        """Let go of the file."""
        self._database.close()
        if remove:
            self.file.unlink(missing_ok=True)

    def _count(self, what: str) -> int:
        return int(self._database.execute(f"SELECT COUNT(*) FROM {what}").fetchone()[0])

    def _some(self, what: str) -> list[str]:
        return [key for (key,) in self._database.execute(f"SELECT key FROM {what} ORDER BY key LIMIT {EXAMPLES}")]
