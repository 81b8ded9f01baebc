"""Files of rows that are read by number: CSV, TSV and JSON lines by an index of where their rows stand.

The index is made once and mapped from the cache, so that ten million rows take a process no memory.
"""

from __future__ import annotations

import csv
import json
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from distill_core import DataError, ShardError, cache_folder, load_index

csv.field_size_limit(100_000_000)
_FORMAT = 1
TOGETHER = 20_000
"""Rows between two moves of the bar."""
_LOOK = 100
"""Rows of JSON lines that are read for the names of their columns."""


class BadRow(Exception):
    """Why a row makes no sample; `line` is its line (of parquet and arrow files its number, from 1)."""

    def __init__(self, reason: str, line: int, key: str | None = None) -> None:
        super().__init__(reason)
        self.line, self.key = line, key if key is not None else f"row {line}"


class Location(NamedTuple):
    """A row: where it begins in the file, its length, its line, and the key that rows of its sample share."""

    start: int
    length: int
    line: int
    key: str | None


class TableFile(ABC):
    """A file of rows. Rows of one key are one sample, which stands where the first of them does; a row without a key is
    a sample by itself. Small and picklable: the index is read again from the cache."""

    def __init__(self, path: Path, key: str | None) -> None:
        """`key` is the column whose value rows of one sample share; None where each row is a sample."""
        self.path, self.key = path, key
        self.room = 50.0
        """Gigabytes of the cache for copies of its rows, where it needs any."""
        self._index: NDArray[np.int64] | None = None
        """[4, 1 + rows] by sample: start, length, line, sample; first the file's (bytes, change in ns, format), and the
        number of samples."""

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_index": None}

    @abstractmethod
    def columns(self) -> list[str]:
        """Their names. Raises `DataError`."""

    @abstractmethod
    def locate(self) -> Iterator[Location]:
        """Every row in order. Raises `DataError` for what cannot be cut into rows, `OSError`."""

    def extent(self) -> int:
        """The sum of the rows' lengths, about."""
        return self.path.stat().st_size

    @abstractmethod
    def row(self, start: int, length: int, line: int) -> Mapping[str, Any]:
        """A row by its columns. Raises `BadRow`, `OSError`, and `ShardError` where the file has changed."""

    def problem(self) -> str | None:
        """Why it cannot be read, of a file that is missing."""
        return None if self.path.is_file() else f"{self.path}: no such file. Check data.source."

    def __len__(self) -> int:
        """Samples. Raises `DataError`."""
        return int(self.index()[3, 0])

    def __getitem__(self, number: int) -> list[tuple[int, Mapping[str, Any]]]:
        """The rows of a sample, each with its line. Raises `BadRow`, `ShardError`."""
        index = self.index()
        first, last = (1 + int(np.searchsorted(index[3, 1:], n)) for n in (number, number + 1))
        rows = []
        try:
            for position in range(first, last):
                start, length, line = (int(value) for value in index[:3, position])
                rows.append((line, self.row(start, length, line)))
        except OSError as error:
            raise ShardError(f"{self.path}: cannot be read: {error.strerror or error}") from error
        return rows

    def fingerprint(self) -> str:
        """Name, size and time of change."""
        try:
            return "{} {} {}".format(self.path, *_stamp(os.stat(self.path)))
        except OSError:  # whoever reads it says so
            return f"{self.path} cannot be read"

    def index(self) -> NDArray[np.int64]:
        """That of the cache, where it is of the file as it is; else it is made. Raises `DataError`."""
        if self._index is None:
            try:
                self._index = self._stored()
                if self._index is None:
                    self._index = self._build()
            except OSError as error:
                raise DataError(f"{self.path}: cannot be read: {error.strerror or error}") from error
        return self._index

    def unchanged(self, status: os.stat_result) -> None:
        """Raises `ShardError` where the file is not what the index was made of."""
        if _stamp(status) != tuple(self.index()[:2, 0]):
            raise ShardError(f"{self.path}: has changed since the run began")

    @property
    def _index_file(self) -> Path:
        identity = os.fsencode(self.path.absolute()) + f"\0{type(self).__name__}\0{self.key}".encode()
        return cache_folder() / "tables" / f"{blake2b(identity, digest_size=16).hexdigest()}.npy"

    def _stored(self) -> NDArray[np.int64] | None:
        stamp = _stamp(os.stat(self.path))
        index = load_index(self._index_file)
        if index is None:
            return None
        fits = index.ndim == 2 and len(index) == 4 and tuple(index[:3, 0]) == (*stamp, _FORMAT)
        return index if fits else None

    def _build(self) -> NDArray[np.int64]:
        stamp = _stamp(os.stat(self.path))
        parts: list[NDArray[np.int64]] = []
        """[4, some rows] each: start, length, line, hash of the key."""
        locations = self.locate()
        with _progress(f"index of {self.path.name}", self.extent()) as advance:
            while part := [(at.start, at.length, at.line, _hash(at)) for at in islice(locations, TOGETHER)]:
                parts.append(np.array(part, dtype=np.int64).T)
                advance(int(parts[-1][1].sum()))

        def column(number: int) -> NDArray[np.int64]:
            return np.concatenate([part[number] for part in parts]) if parts else np.empty(0, np.int64)

        order, samples = _by_sample(column(3))
        head = (*stamp, _FORMAT, int(samples[-1]) + 1 if len(samples) else 0)

        def pieces() -> Iterator[NDArray[np.int64]]:
            """The index's rows, one after another, so that few copies are in memory at once."""
            for number, first in enumerate(head):
                yield np.array([first], np.int64)
                yield samples if number == 3 else column(number)[order]

        with suppress(OSError):  # it is made again by the next run
            with temporary_in(self._index_file.parent) as file:
                shape = (len(head), 1 + len(samples))
                np.lib.format.write_array_header_1_0(file, {"descr": "<i8", "fortran_order": False, "shape": shape})
                for piece in pieces():
                    file.write(piece.astype("<i8", copy=False).data)
                file.flush()
                Path(file.name).replace(self._index_file)
            if (stored := self._stored()) is not None:
                return stored
        return np.concatenate(list(pieces())).reshape(len(head), -1)


class CsvTable(TableFile):
    """`.csv` and `.tsv`, whose first line names the columns; quotes are Excel's."""

    def columns(self) -> list[str]:
        with open(self.path, encoding="utf-8-sig", errors="backslashreplace", newline="") as file:
            try:
                return next(csv.reader(file, delimiter=self._delimiter), [])
            except csv.Error as error:
                raise DataError(f"{self.path}:1: not readable: {error}") from error

    def locate(self) -> Iterator[Location]:
        columns = self.columns()
        key = columns.index(self.key) if self.key in columns else None
        end = line = 0

        def lines(file: Any) -> Iterator[str]:
            nonlocal end
            for raw in file:
                end += len(raw)
                yield raw.decode("utf-8", "surrogateescape")

        with open(self.path, "rb") as file:
            reader = csv.reader(lines(file), delimiter=self._delimiter)
            try:
                next(reader, None)
                start, line = end, reader.line_num
                for values in reader:
                    if values:
                        value = values[key] if key is not None and key < len(values) else None
                        yield Location(start, end - start, line + 1, value or None)
                    start, line = end, reader.line_num
            except csv.Error as error:
                raise DataError(
                    f"{self.path}:{line + 1}: not readable: {error}; is there a quotation mark that is never closed?"
                ) from error

    def row(self, start: int, length: int, line: int) -> Mapping[str, Any]:
        text = _decoded(_bytes(self, start, length), line)
        try:
            values = next(csv.reader([text], delimiter=self._delimiter))
        except csv.Error as error:
            raise BadRow(f"not readable: {error}", line) from error
        columns = self._columns()
        if len(values) != len(columns):
            raise BadRow(f"has {len(values)} columns, and the first line names {len(columns)}", line)
        return dict(zip(columns, values, strict=True))

    def _columns(self) -> list[str]:
        if "_names" not in self.__dict__:
            self._names = self.columns()
        return self._names

    @property
    def _delimiter(self) -> str:
        return "\t" if self.path.suffix == ".tsv" else ","


class JsonTable(TableFile):
    """JSON lines: an object a line."""

    def columns(self) -> list[str]:
        names: dict[str, None] = {}
        with open(self.path, "rb") as file:
            for raw in islice(file, _LOOK):
                with suppress(ValueError, RecursionError):  # a row that cannot be read is counted when it is due
                    names |= dict.fromkeys(row) if isinstance(row := json.loads(raw), dict) else {}
        return list(names)

    def locate(self) -> Iterator[Location]:
        start = 0
        with open(self.path, "rb") as file:
            for line, raw in enumerate(file, 1):
                if raw.strip():
                    yield Location(start, len(raw), line, self._key(raw))
                start += len(raw)

    def _key(self, raw: bytes) -> str | None:
        if self.key is None:
            return None
        try:
            value = json.loads(raw)[self.key]
        except (ValueError, RecursionError, KeyError, TypeError, IndexError):
            return None
        return str(value) if isinstance(value, str | int) else None

    def row(self, start: int, length: int, line: int) -> Mapping[str, Any]:
        try:
            row = json.loads(_decoded(_bytes(self, start, length), line))
        except (ValueError, RecursionError) as error:
            raise BadRow(f"not readable json: {error}", line) from error
        if not isinstance(row, dict):
            raise BadRow("the json is not an object", line)
        return row


@contextmanager
def temporary_in(folder: Path) -> Iterator[IO[bytes]]:
    """A file to be renamed when it is complete, in a folder that is made; removed where it was not. All may read it:
    several people may share a cache. Raises `OSError`."""
    folder.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile(dir=folder, prefix=".", delete=False) as file:
        os.fchmod(file.fileno(), 0o644)
        try:
            yield file
        finally:
            Path(file.name).unlink(missing_ok=True)


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, which goes when it is full."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.advance(task, done)


def _stamp(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


def _hash(at: Location) -> int:
    """Equal for rows of one sample. Python's own, of 64 bits, which differs between processes: only which are equal
    is stored."""
    return hash(f"\0{at.line}" if at.key is None else at.key)


def _by_sample(hashes: NDArray[np.int64]) -> tuple[slice | NDArray[np.int64], NDArray[np.int64]]:
    """The rows' order by sample, where samples are numbered by their first rows; and their samples in that order."""
    ordered = np.sort(hashes)
    if (ordered[1:] != ordered[:-1]).all():
        return slice(None), np.arange(len(hashes))
    del ordered
    _, firsts, members = np.unique(hashes, return_index=True, return_inverse=True)
    rank = np.empty(len(firsts), np.int64)
    rank[np.argsort(firsts)] = np.arange(len(firsts))
    samples = rank[members]
    order = np.argsort(samples, kind="stable")
    return order, samples[order]


def _bytes(table: TableFile, start: int, length: int) -> bytes:
    with open(table.path, "rb", buffering=0) as file:
        table.unchanged(os.fstat(file.fileno()))
        return os.pread(file.fileno(), length, start)


def _decoded(data: bytes, line: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRow(f"not UTF-8: {error.reason} at byte {error.start} of the row", line) from error
