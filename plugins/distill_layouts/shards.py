"""Rows of a table as shards, and a list of files as such a table."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

from distill_core import DataError, DataSource, Patience, Sample, Shard, Unusable, cache_folder, stamps
from distill_layouts.files import FileSample, inside, is_there, picture_field, printable
from distill_layouts.tables import BadRow, JsonTable, TableFile, temporary_in

ROWS = 1000
"""Samples of a shard."""
LOOK = 20
"""The first samples, which are looked at before a wrong option is suspected."""
SPLITS = ("train", "validation", "test")

Make = Callable[[list[tuple[int, Mapping[str, Any]]]], Sample]
"""The rows of a sample, each with its line -> the sample. Raises `BadRow`. Picklable."""


class RowShard(Shard):
    """Some samples of a table in a row."""

    def __init__(self, table: TableFile, place: str, first: int, count: int, make: Make, beside: Path | None) -> None:
        self.table, self.first, self.count, self.make, self.beside = table, first, count, make, beside
        self.place = place
        self.name = f"{place}[{first}:{first + count}]"

    def problem(self) -> str | None:
        return self.table.problem()

    def prepare(self, patience: Patience) -> None:
        self.table.room = patience.shard_cache

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Sample:
        if not 0 <= number < self.count:
            raise IndexError(f"{self.name}: has {self.count} samples")
        try:
            return self.make(self.table[self.first + number])
        except BadRow as error:
            return Unusable(error.key, f"{self.place}:{error.line}", str(error))

    def fingerprint(self) -> str:
        """The table's, and the sizes and times of change of the files that its samples are."""
        more = sorted(self.beside.iterdir()) if self.beside is not None else []
        files = [path for sample in self if isinstance(sample, FileSample) for path in sample.paths]
        return f"{self.table.fingerprint()} {self.name}\n{stamps([*files, *more])}"


def shards_of(table: TableFile, place: str, make: Make, beside: Path | None = None) -> list[Shard]:
    """All samples of a table, some in each shard; errors call it `place`, and `beside` holds more of their files."""
    total = len(table)
    firsts = range(0, total, ROWS)
    return [RowShard(table, place, first, min(ROWS, total - first), make, beside) for first in firsts]


def check_first(shards: Sequence[Shard], where: object, layout: str) -> None:
    """Raises `DataError` where there is no sample, where none of the first can be used, and where none of their files
    is there: a wrong folder or option, and not a broken file."""
    samples = list(islice((shard[number] for shard in shards for number in range(len(shard))), LOOK))
    if not samples:
        raise DataError(f"{where}: holds no sample; expected {layout}")
    reasons = []
    missing = []
    for sample in samples:
        if isinstance(sample, Unusable):
            reasons.append(f"{sample['__key__']} ({sample.reason})")
        elif isinstance(sample, FileSample) and sample.paths and not any(map(is_there, sample.paths)):
            missing.append(sample.paths[0])
    if len(reasons) + len(missing) < len(samples):
        return
    if missing:
        raise DataError(f"{where}: lacks the files, as {printable(str(missing[0]))}; expected {layout}")
    raise DataError(f"{where}: none of the first samples can be used, as {reasons[0]}; expected {layout}")


@dataclass(frozen=True)
class ListedFiles:
    """A row `{key, files: {field: path}}` of a list, perhaps with `about`, which becomes its json -> its sample.

    A row `{key, reason}` is a bad sample.
    """

    base: Path

    def __call__(self, rows: list[tuple[int, Mapping[str, Any]]]) -> Sample:
        ((line, row),) = rows
        key = str(row["key"])
        if "reason" in row:
            raise BadRow(row["reason"], line, key)
        fields: dict[str, Path | bytes] = {}
        for field, name in row["files"].items():
            try:
                fields[field] = inside(self.base, name)
            except ValueError as error:
                raise BadRow(str(error), line, key) from error
        url = printable(str(next(iter(fields.values()))))
        if "about" in row:
            fields["json"] = json.dumps(row["about"]).encode()
        return FileSample(key, url, fields)


def picture_row(key: str, path: Path, about: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row of a list for a picture (an absolute path) and what its json is."""
    return {"key": printable(key), "files": {picture_field(path): str(path)}, "about": dict(about)}


def listed(
    place: str, rows: Iterable[Mapping[str, Any]], make: Make | None = None, beside: Path | None = None
) -> list[Shard]:
    """Shards of rows that a source lists, which may be many: they are written to the cache, and read from there.

    `make` turns a row into its sample; as `ListedFiles` with absolute paths where there is none. Raises `DataError`.
    """
    folder, digest = cache_folder() / "listings", blake2b(digest_size=16)
    try:
        with temporary_in(folder) as file:
            for row in rows:
                line = json.dumps(row).encode() + b"\n"
                digest.update(line)
                file.write(line)
            file.flush()
            path = folder / f"{digest.hexdigest()}.jsonl"
            if not path.is_file():  # its name is its content's, and its index that of this file
                Path(file.name).replace(path)
    except OSError as error:
        raise DataError(f"{folder}: the list of files cannot be written: {error.strerror or error}") from error
    return shards_of(JsonTable(path, key=None), place, make or ListedFiles(Path("/")), beside)


class NamedSplits(DataSource):
    """Base of sources whose options `train`, `validation` and `test` name a place, or null."""

    @classmethod
    def splits(cls, config: Any) -> tuple[str, ...]:
        """Those whose place is named."""
        return tuple(split for split in SPLITS if getattr(config, split) is not None)
