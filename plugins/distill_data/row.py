"""The data that a command names, as one row of samples, and work on it by several threads, in order."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from distill_core import (
    DataError,
    DataSource,
    Patience,
    Sample,
    Shard,
    Shards,
    TarShard,
    UserError,
    progress_bar,
    tar_shards,
)
from distill_core.tools import RecipeErrors, load_recipe, measure, read_source, retry

if TYPE_CHECKING:
    from distill_core.tools import Recipe, Registry

A = TypeVar("A")
B = TypeVar("B")
TABLES = (".csv", ".tsv", ".jsonl", ".parquet", ".arrow")
TOGETHER = 8
"""Items that a thread takes at a time."""


@dataclass(frozen=True)
class Named:
    """What SOURCE stands for: its shards by set, and the recipe where it is one."""

    title: str
    sets: Mapping[str, Sequence[Shard]]
    recipe: Recipe | None = None


def named(text: str, split: str, registry: Registry, overrides: Sequence[str] = ()) -> Named:
    """Shards (wildcards and braces) or a folder of them, a folder of files with captions beside them, a table, a data
    source by its name or options, or a recipe.

    Raises `UserError`, which says what to write instead.
    """
    title, path = text, Path(text)
    if path.is_dir() and any(path.glob("*.tar")):
        text = str(path / "*.tar")
    elif path.is_dir():
        text = json.dumps({"name": "folder", split: text})
    elif path.suffix in TABLES and path.is_file():
        text = json.dumps({"name": "table", split: text})
    source, recipe = read_source(text, registry), None
    if source is None and not overrides and (".tar" in text or "://" in text or text.startswith("pipe:")):
        sets = tar_shards(text)
        Shards(sets["data"])  # raises where one is missing
        return Named(text, sets)
    if source is None:
        try:
            recipe = load_recipe(text, registry=registry, overrides=overrides)
        except RecipeErrors as error:
            if "no recipe of this name" not in str(error):
                raise
            names = ", ".join(name for kind, name in registry.entries if kind == "source")
            raise UserError(
                f"{text!r} is neither shards (*.tar), nor a folder, a table, a data source ({names}) or a recipe"
            ) from error
        source = recipe.data.source.build()
    elif overrides:
        raise UserError(f"--set changes a recipe, and {title} is none: give the options of a data source in SOURCE")
    source.prepare()
    return Named(title if title != text else f"{title}, split {split}", _sets(source, split, title), recipe)


def _sets(source: DataSource, split: str, text: str) -> Mapping[str, Sequence[Shard]]:
    if sets := source.sets(split):
        return sets
    if source.samples(split):
        raise DataError(f"{text}: has no shards, so that nothing can be trained on it; `distill eval` scores it")
    raise DataError(f"{text}: has no split {split!r}; name one of its splits by --split")


class Row:
    """The samples of all shards, set after set, by position."""

    def __init__(self, sets: Mapping[str, Sequence[Shard]], patience: Patience, *, tolerant: bool = False) -> None:
        """Opens every shard, with a progress bar. Raises `DataError` for one that cannot be; where `tolerant` it is
        `lost`."""
        everything = [(name, shard) for name, shards in sets.items() for shard in shards]
        self.patience = patience
        with progress_bar(len(everything), "opening shards") as advance:
            lengths = measure([shard for _, shard in everything], patience, resuming=tolerant, progress=advance)
        if lengths.unopened and not tolerant:
            raise DataError(next(iter(lengths.unopened.values())))
        self.lost = {everything[i][1].name: reason for i, reason in lengths.unopened.items()}
        """Of each shard that cannot be opened, why."""
        opened = [i for i in range(len(everything)) if i not in lengths.unopened]
        self.sets = [everything[i][0] for i in opened]
        """The set of each shard."""
        self.shards = [everything[i][1] for i in opened]
        self.lengths = [lengths.samples[i] for i in opened]
        self.ends = np.cumsum(self.lengths)
        # several threads may read a tar at once; of other shards that is not known. A field that is a file opens later
        self._locks = [nullcontext() if isinstance(shard, TarShard) else Lock() for shard in self.shards]

    def __len__(self) -> int:
        return int(self.ends[-1])

    def shard(self, position: int) -> int:
        """The number of the shard in which the sample at a position stands."""
        return int(np.searchsorted(self.ends, position, side="right"))

    def read(self, position: int) -> Sample:
        """The sample, undecoded; several threads may call it. Raises `DataError` where its shard cannot be read."""
        i = self.shard(position)
        shard, number = self.shards[i], position - int(self.ends[i]) + self.lengths[i]
        with self._locks[i]:
            return retry(lambda: shard[number], shard, self.patience)


def in_order(function: Callable[[A], B], items: Sequence[A], jobs: int) -> Iterator[B]:
    """`map(function, items)`, computed by `jobs` threads a little ahead; 1 computes in the caller's.

    Decoding, resizing and reading let other threads run meanwhile, so that processes would only add copies.
    """
    from torchdata.nodes import IterableWrapper, Loader, ParallelMapper

    chunks = IterableWrapper(_Chunks(items))
    mapped = ParallelMapper(
        chunks,
        lambda chunk: [_result(function, item) for item in chunk],
        num_workers=jobs if jobs > 1 else 0,
        in_order=True,
        method="thread",
        snapshot_frequency=sys.maxsize,  # its own state is not needed: what is done stands in the journal
    )
    for results in Loader(mapped):
        for result in results:
            if isinstance(result, _Failed):
                raise result.error
            yield result


@dataclass
class _Failed:
    """An error in its item's place: the mapper would wrap it into another, with a traceback for a message."""

    error: Exception


def _result(function: Callable[[A], B], item: A) -> B | _Failed:
    try:
        return function(item)
    except Exception as error:
        return _Failed(error)


class _Chunks(Iterable[Sequence[A]]):
    def __init__(self, items: Sequence[A]) -> None:
        self.items = items

    def __iter__(self) -> Iterator[Sequence[A]]:
        for start in range(0, len(self.items), TOGETHER):
            yield self.items[start : start + TOGETHER]
