"""Rows of Arrow and parquet files, by number.

Arrow files are mapped. The row groups of a parquet file are copied to the cache as such files, with the columns that
are read, when a row of them is first read.
"""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from hashlib import blake2b
from itertools import accumulate, chain, repeat
from pathlib import Path
from typing import Any

from distill_core import DataError, cache_folder, make_room, require_extra
from distill_layouts.tables import TOGETHER, Location, TableFile, temporary_in

_BATCH = 1000
"""Rows of a copy that are read together."""
_GIGABYTE = 10**9


class ArrowTable(TableFile):
    """A file of Arrow's IPC formats, as Hugging Face's `save_to_disk` and feather write them."""

    def __init__(self, path: Path, key: str | None, read: Sequence[str]) -> None:
        """`read` are the columns that are read."""
        super().__init__(path, key)
        self.read = tuple(read)

    def columns(self) -> list[str]:
        return list(self.schema().names)

    def locate(self) -> Iterator[Location]:
        number = 0
        for keys in self._keys():
            for key in keys:
                number += 1
                yield Location(number - 1, 1, number, key if isinstance(key, str) and key else None)

    def row(self, start: int, length: int, line: int) -> Mapping[str, Any]:
        self.unchanged(os.stat(self.path))
        row: Mapping[str, Any] = self.at(start).to_pylist()[0]
        return self._named(row)

    def extent(self) -> int:
        return self._mapped().rows

    def schema(self) -> Any:
        """Arrow's. Raises `DataError`."""
        return self._mapped().schema

    def at(self, row: int) -> Any:
        """Arrow's batch of one row."""
        return self._mapped().at(row).select(self._read())

    def _read(self) -> list[str]:
        names = self.columns()
        return [name for name in self.read if name in names]

    def _keys(self) -> Iterator[Iterable[Any]]:
        """The key column, some rows at a time; None for each row without one."""
        mapped = self._mapped()
        if not self._has_text_key():
            yield repeat(None, mapped.rows)
            return
        for batch in mapped.batches:
            for first in range(0, batch.num_rows, TOGETHER):
                yield batch.column(self.key).slice(first, TOGETHER).to_pylist()

    def _has_text_key(self) -> bool:
        pyarrow = require_extra("pyarrow", "parquet")
        if self.key not in self.columns():
            return False
        kind = self.schema().field(self.key).type
        return bool(pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind))

    def _mapped(self) -> Mapped:
        """The whole file. Raises `DataError`, `OSError`."""
        return _readable(self.path, os.stat(self.path).st_mtime_ns)

    def _named(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """Hugging Face's classes by their names, not their numbers."""
        names = _classes((self.schema().metadata or {}).get(b"huggingface", b"{}"))
        return {
            column: names[column][value]
            if column in names and isinstance(value, int) and 0 <= value < len(names[column])
            else value
            for column, value in row.items()
        }


class ParquetTable(ArrowTable):
    """A parquet file."""

    def extent(self) -> int:
        return (self._parquet()[1] or [0])[-1]

    def schema(self) -> Any:
        return self._parquet()[0].schema_arrow

    def at(self, row: int) -> Any:
        _, ends = self._parquet()
        group = bisect_right(ends, row)
        first = ends[group - 1] if group else 0
        # the copy's name is its content's, and its time of change that of its last use
        return _readable(self._copy(group), 0).at(row - first)

    def _keys(self) -> Iterator[Iterable[Any]]:
        file, ends = self._parquet()
        if not self._has_text_key():
            yield repeat(None, ends[-1] if ends else 0)
            return
        for batch in file.iter_batches(TOGETHER, columns=[self.key], use_threads=False):
            yield batch.column(0).to_pylist()

    def _parquet(self) -> tuple[Any, list[int]]:
        """The file, and the number of rows up to the end of each row group. Raises `DataError`, `OSError`."""
        try:
            return _parquet(str(self.path), os.stat(self.path).st_mtime_ns)
        except ValueError as error:
            raise DataError(f"{self.path}: not a readable parquet file: {error}") from error

    def _batches(self, group: int) -> Iterator[Any]:
        """The rows of a row group, some at a time. Raises `DataError`."""
        try:
            yield from self._parquet()[0].iter_batches(_BATCH, [group], self._read(), use_threads=False)
        except ValueError as error:
            raise DataError(f"{self.path}: row group {group} cannot be read: {error}") from error

    def _copy(self, group: int) -> Path:
        """A row group in the cache, as an Arrow file. Raises `OSError`, `DataError`."""
        identity = f"{self.fingerprint()}\0{group}\0{self._read()}"
        folder = cache_folder() / "tables"
        target = folder / f"{blake2b(identity.encode('utf-8', 'surrogateescape'), digest_size=16).hexdigest()}.arrow"
        try:
            os.utime(target)
            return target
        except FileNotFoundError:
            pass
        pyarrow = require_extra("pyarrow", "parquet")
        batches = self._batches(group)  # one after another: a file may be a single group
        first = next(batches)
        try:
            with temporary_in(folder) as file:
                with pyarrow.ipc.new_file(file, first.schema) as writer:
                    for batch in chain((first,), batches):
                        writer.write_batch(batch)
                file.flush()
                Path(file.name).replace(target)
        except OSError as error:
            raise OSError(f"a copy of its rows cannot be written to {folder}: {error.strerror or error}") from error
        make_room(folder, target, self.room * _GIGABYTE, "*.arrow")
        return target


class Mapped:
    """A table whose columns lie in a mapped file."""

    def __init__(self, table: Any) -> None:
        self.schema = table.schema
        self.batches = table.to_batches()
        self._ends = list(accumulate(batch.num_rows for batch in self.batches))
        self.rows: int = table.num_rows

    def at(self, row: int) -> Any:
        """A batch of this row; the table itself would look at all of its batches for it."""
        number = bisect_right(self._ends, row)
        return self.batches[number].slice(row - (self._ends[number - 1] if number else 0), 1)


def _readable(path: Path, changed: int) -> Mapped:
    """Raises `DataError` where it is no Arrow file, `OSError`."""
    try:
        return _mapped(str(path), changed)
    except ValueError as error:
        raise DataError(f"{path}: not a readable Arrow file: {error}") from error


@lru_cache(maxsize=256)
def _mapped(path: str, changed: int) -> Mapped:
    pyarrow = require_extra("pyarrow", "parquet")
    file = pyarrow.memory_map(path)
    try:
        return Mapped(pyarrow.ipc.open_file(file).read_all())
    except pyarrow.ArrowInvalid:  # the other of the two formats
        file.seek(0)
        return Mapped(pyarrow.ipc.open_stream(file).read_all())


@lru_cache(maxsize=64)
def _parquet(path: str, changed: int) -> tuple[Any, list[int]]:
    parquet = require_extra("pyarrow.parquet", "parquet")
    file = parquet.ParquetFile(path, memory_map=True)
    ends: list[int] = []
    for group in range(file.num_row_groups):
        ends.append((ends[-1] if ends else 0) + file.metadata.row_group(group).num_rows)
    return file, ends


@lru_cache(maxsize=64)
def _classes(metadata: bytes) -> Mapping[str, list[str]]:
    """Column -> the names of its classes, as `datasets` writes them into a schema."""
    features = json.loads(metadata).get("info", {}).get("features", {})
    return {
        name: feature["names"]
        for name, feature in features.items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and feature.get("names")
    }
