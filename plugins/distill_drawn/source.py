"""A source that draws its samples once, into shards of a cache folder."""

from __future__ import annotations

import json
import sys
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b, sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from distill_core import (
    DataError,
    DataSource,
    Diagnostic,
    Shard,
    TarShard,
    cache_folder,
    in_words,
    install,
    progress_bar,
    size_of,
)
from distill_drawn import shards
from distill_drawn.shards import Drawn, Entry
from distill_drawn.svg import Refused

SPLITS = ("train", "validation", "test")

SAME = "the same picture as"
"""Begins the reason of what is left out because another sample looks alike."""


@dataclass(frozen=True)
class Item:
    """A sample that is to be drawn. `draw` raises `Refused` where it cannot be."""

    name: str
    draw: Callable[[], Drawn]


@dataclass(frozen=True)
class ShardPlan:
    """Where a shard belongs; `number` is its place among the shards of its split and style."""

    split: str
    style: str
    number: int


class DrawnSource(DataSource):
    """Base: says what its shards are made of and how their samples are drawn; they are kept by the hash of the former.

    Shards are written atomically, each is in the manifest as soon as it is finished, and all are the same bytes
    wherever they are drawn; a killed run continues where it was, and of two processes one does the work.
    """

    @classmethod
    def splits(cls, config: Any) -> tuple[str, ...]:
        """All three."""
        return SPLITS

    @abstractmethod
    def made_from(self) -> dict[str, Any]:
        """All that decides the bytes, as json. Raises `DataError`."""

    @abstractmethod
    def plan(self) -> dict[str, ShardPlan]:
        """By the shard's file name."""

    @abstractmethod
    def items(self, names: Sequence[str]) -> Mapping[str, Sequence[Item]]:
        """What is to be drawn for the shards `names`."""

    @property
    def folder(self) -> Path:
        """The cache folder, named by the hash of what decides the bytes. Raises `DataError`."""
        digest = blake2b(json.dumps(self.made_from(), sort_keys=True).encode(), digest_size=6).hexdigest()
        cache = self.config.cache
        base = Path(cache).expanduser().absolute() if cache else cache_folder()
        return base / f"{self.name.replace('_', '-')}-{digest}"

    def prepare(self) -> None:
        """Write the shards that are missing or damaged; quick where all are there. Raises `DataError`."""
        folder, names = self.folder, list(self.plan())
        if not shards.unfinished(folder, names):
            return
        try:
            with shards.alone(folder):
                # another process may have written them while this one waited
                if missing := shards.unfinished(folder, names):
                    self._write(folder, missing)
        except OSError as error:
            raise DataError(f"{self.name} data: cannot write {folder}: {error.strerror or error}") from error

    def sets(self, split: str) -> dict[str, list[Shard]]:
        """Style -> its shards. Raises `DataError` where `prepare` has not run."""
        folder = self.folder
        sets: dict[str, list[Shard]] = {}
        for name, entry in self._entries(folder, split):
            if entry.samples:
                sets.setdefault(entry.style, []).append(TarShard(folder / name))
        return sets

    def _entries(self, folder: Path, split: str) -> Iterator[tuple[str, Entry]]:
        entries = shards.read_manifest(folder)
        for name, shard in self.plan().items():
            if name not in entries:
                raise DataError(f"{self.name} data is not complete in {folder}: call prepare() first")
            if shard.split == split:
                yield name, entries[name]

    def _write(self, folder: Path, names: list[str]) -> None:
        """Draw and write the shards `names`."""
        begun = time.perf_counter()
        made_from, plan, items = self.made_from(), self.plan(), self.items(names)
        entries = {name: entry for name, entry in shards.read_manifest(folder).items() if name in plan}
        with progress_bar(sum(map(len, items.values())), f"{self.name} pictures") as advance:
            for name in names:
                samples: list[Drawn] = []
                left_out: dict[str, str] = {}
                for item in items[name]:
                    try:
                        samples.append(item.draw())
                    except Refused as reason:
                        left_out[item.name] = str(reason)
                    advance()
                data = shards.pack(samples)
                shards.write(folder / name, data)
                shard = plan[name]
                entries[name] = Entry(shard.split, shard.style, len(samples), sha256(data).hexdigest(), left_out)
                shards.write_manifest(folder, made_from, entries)
        self._report([entries[name] for name in names], folder, time.perf_counter() - begun)

    def _report(self, entries: list[Entry], folder: Path, seconds: float) -> None:
        """One line of what was written, another of what was left out."""
        samples = sum(entry.samples for entry in entries)
        print(f"{self.name}: {samples} pictures in {len(entries)} shards, {seconds:.1f} s: {folder}", file=sys.stderr)
        left = [(entry.style, *item) for entry in entries for item in entry.left_out.items()]
        others = sorted({f"{name} ({style})" for style, name, why in left if not why.startswith(SAME)})
        same = sum(why.startswith(SAME) for _, _, why in left)
        if left:
            named = ", ".join(others[:10]) + (", ..." if len(others) > 10 else "")
            print(
                f"{self.name}: left out {same} with the picture of a like concept, {len(others)} more"
                f"{': ' + named if others else ''} (why is in {shards.MANIFEST})",
                file=sys.stderr,
            )


def versions(packages: Sequence[str], extra: str) -> dict[str, str]:
    """The installed versions of packages. Raises `DataError` naming all that are missing, and the extra with them."""
    installed: dict[str, str] = {}
    for package in packages:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            continue
    if missing := [package for package in packages if package not in installed]:
        raise DataError(f"{extra} data needs {', '.join(missing)}: {install(extra)}")
    return installed


def cached(name: str) -> list[Diagnostic]:
    """What `distill doctor` says of a source's cache folders."""
    diagnostics = []
    for folder in sorted(cache_folder().glob(f"{name}-*")):
        samples = sum(entry.samples for entry in shards.read_manifest(folder).values())
        diagnostics.append(Diagnostic("data", folder.name, f"{samples} pictures, {in_words(size_of(folder))}"))
    return diagnostics
