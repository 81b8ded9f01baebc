"""Collections to embed and search: a folder of images, WebDataset shards, or a data source as in a recipe."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor

from distill_core import (
    BadSample,
    DataError,
    EvaluationSet,
    FeatureKind,
    Model,
    Sample,
    Shards,
    UserError,
    fingerprint,
    stamps,
    tar_shards,
)
from distill_core.tools import Registry, read_source

PICTURES = (".jpg", ".jpeg", ".png", ".webp")

Place = tuple[str, int]
"""An item: its key, and its number (from 0) among the items of that key."""


def places(keys: Sequence[str]) -> list[Place]:
    """The places of items from their keys, in the order of `Collection.embed`."""
    counts: Counter[str] = Counter()
    result = []
    for key in keys:
        result.append((key, counts[key]))
        counts[key] += 1
    return result


class Collection(ABC):
    """Items with keys, which can be embedded and read again."""

    name: str
    """Identifies the collection, also after its files have changed."""
    title: str
    """Its name in messages."""

    @abstractmethod
    def embed(
        self, model: Model, modality: str, field: str | None, features: FeatureKind
    ) -> tuple[Tensor, list[str], list[str]]:
        """Embeddings [N, D], the key of each, and a line for each item that cannot be read. Raises `DataError`."""

    @abstractmethod
    def read(self, model: Model, modality: str, requested: Sequence[Place]) -> dict[Place, Any]:
        """The decoded items at these places; places without an item are left out."""

    def holds(self, path: Path) -> bool:
        """Whether this file is one of its items."""
        return False

    @abstractmethod
    def fingerprint(self) -> str:
        """A text that changes when the collection does."""


class Folder(Collection):
    """The pictures below a folder; keys are paths inside it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.name, self.title = str(self.folder), str(folder)
        pictures = (path for path in self.folder.rglob("*") if path.suffix.lower() in PICTURES and path.is_file())
        self.keys = sorted(path.relative_to(self.folder).as_posix() for path in pictures)
        if not self.keys:
            raise DataError(f"{folder}: holds no picture ({', '.join(PICTURES)}); for shards, name the tar files")

    def embed(
        self, model: Model, modality: str, field: str | None, features: FeatureKind
    ) -> tuple[Tensor, list[str], list[str]]:
        """One embedding a picture. Raises `UserError` for a field: files have none."""
        if field is not None:
            raise UserError(f"{self.folder}: the files of a folder have no field {field!r}")
        keys: list[str] = []
        problems: list[str] = []

        def items() -> Iterator[Any]:
            for key in self.keys:
                try:
                    item = self._read(model, modality, key)
                except BadSample as error:
                    problems.append(f"{self.folder / key}: {error}")
                    continue
                keys.append(key)
                yield item

        return model.encode(modality, items(), features=features), keys, problems

    def read(self, model: Model, modality: str, requested: Sequence[Place]) -> dict[Place, Any]:
        """The images; nothing for another modality."""
        items = {}
        for key, number in requested:
            try:
                items[key, number] = self._read(model, modality, key)
            except BadSample:
                continue
        return items

    def _read(self, model: Model, modality: str, key: str) -> Any:
        """The decoded image of a key. Raises `BadSample`."""
        path = self.folder / key
        try:
            data = path.read_bytes()
        except OSError as error:
            raise BadSample(f"cannot be read: {error.strerror or error}") from error
        sample = {"__key__": key, "__url__": str(path), path.suffix[1:].lower(): data}
        return model.augment[modality].decode(sample)[0]

    def holds(self, path: Path) -> bool:
        """Whether it is one of the pictures."""
        return path.resolve() in {(self.folder / key).resolve() for key in self.keys}

    def fingerprint(self) -> str:
        """Names, sizes and modification times of the files."""
        return stamps(self.folder / key for key in self.keys)


class Samples(Collection):
    """The samples of WebDataset shards or of another source, by their keys. A sample may have several items."""

    def __init__(self, name: str, source: Iterable[Sample], title: str | None = None) -> None:
        self.samples = EvaluationSet("collection", source)
        self.name, self.title = name, name if title is None else title

    def embed(
        self, model: Model, modality: str, field: str | None, features: FeatureKind
    ) -> tuple[Tensor, list[str], list[str]]:
        """One embedding per item of a sample."""
        embedded, owners = self.samples.embeddings(model, modality, field, features=features)
        names = [str(sample["__key__"]) for sample in self.samples]
        problems = [
            f"{skipped.url}: sample {skipped.key!r}: {skipped.reason}" for skipped in self.samples.skipped.values()
        ]
        return embedded, [names[owner] for owner in owners.tolist()], problems

    def read(self, model: Model, modality: str, requested: Sequence[Place]) -> dict[Place, Any]:
        """Reads the shards again, up to the last of the places."""
        remaining, keys = set(requested), {key for key, _ in requested}
        counts: Counter[str] = Counter()
        items_by_place: dict[Place, Any] = {}
        for sample in self.samples:
            if (key := str(sample["__key__"])) not in keys:
                continue
            try:
                items = model.augment[modality].decode(sample)
            except BadSample:
                continue
            for item in items:
                place = (key, counts[key])
                counts[key] += 1
                if place in remaining:
                    remaining.discard(place)
                    items_by_place[place] = item
            if not remaining:
                break
        return items_by_place

    def fingerprint(self) -> str:
        """`distill_core.fingerprint` of the samples' source."""
        return fingerprint(self.samples.source)


class _Concatenation:
    """The samples of several sets, one after another."""

    def __init__(self, parts: Iterable[Iterable[Sample]]) -> None:
        self.parts = list(parts)

    def __iter__(self) -> Iterator[Sample]:
        return chain.from_iterable(self.parts)

    def fingerprint(self) -> str:
        """The fingerprints of the parts, a line each or more."""
        return "\n".join(fingerprint(part) for part in self.parts)


def collect(source: str, split: str, registry: Registry) -> Collection:
    """A collection from what a user names: a folder, shards (wildcards and braces), a source's name (`emoji`), or a
    source with options as in a recipe (`{name: webdataset, test: x.tar}`), with its split `split`.

    Raises `UserError`, which says what to write instead.
    """  # fmt: skip
    if Path(source).is_dir():
        return Folder(Path(source))
    title = source
    data_source = read_source(source, registry)
    if data_source is None:
        if source.endswith(".tar") or "://" in source or source.startswith("pipe:"):
            named = Shards(tar_shards(source)["data"])
            return Samples(named.place, named, source)
        names = ", ".join(name for kind, name in registry.entries if kind == "source")
        raise UserError(f"{source!r} is neither a folder of images, nor a shard (*.tar), nor a data source ({names})")
    data_source.prepare()
    if shard_sets := data_source.sets(split):
        shards = Shards([shard for part in shard_sets.values() for shard in part])
        return Samples(shards.place, shards, f"{title}, split {split}")
    if not (sets := data_source.samples(split)):
        raise DataError(f"{source!r} has no split {split!r}")
    return Samples(f"{source} {split}", _Concatenation(sets.values()), f"{title}, split {split}")
