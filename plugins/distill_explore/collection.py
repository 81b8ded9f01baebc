"""What is embedded and searched: a folder of pictures, WebDataset shards, or a data source as a recipe names it."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from distill_core import (
    BadSample,
    DataError,
    DataSource,
    EvaluationSet,
    FeatureKind,
    Model,
    Sample,
    Shards,
    UserError,
    did_you_mean,
    expand,
    fingerprint,
    stamps,
)
from distill_core.tools import Document, RecipeErrors, Registry, located, read_document

PICTURES = (".jpg", ".jpeg", ".png", ".webp")

Place = tuple[str, int]
"""An item: its key, and its number (from 0) among the items of that key."""


def places(keys: Sequence[str]) -> list[Place]:
    """The places of items from their keys, in the order of `Collection.embed`."""
    seen: Counter[str] = Counter()
    found = []
    for key in keys:
        found.append((key, seen[key]))
        seen[key] += 1
    return found


class Collection(ABC):
    """Items with keys."""

    name: str
    """What it is called, the same when its files change."""
    title: str
    """What it is called to a person."""

    @abstractmethod
    def embed(
        self, model: Model, modality: str, field: str | None, features: FeatureKind
    ) -> tuple[Tensor, list[str], list[str]]:
        """Embeddings [N, D], the key of each, and a line for each item that cannot be read. Raises `DataError`."""

    @abstractmethod
    def read(self, model: Model, modality: str, wanted: Sequence[Place]) -> dict[Place, Any]:
        """The items at these places, as they are; places without one are left out."""

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
        found = (path for path in self.folder.rglob("*") if path.suffix.lower() in PICTURES and path.is_file())
        self.keys = sorted(path.relative_to(self.folder).as_posix() for path in found)
        if not self.keys:
            raise DataError(f"{folder}: holds no picture ({', '.join(PICTURES)}); for shards, name the tar files")

    def embed(
        self, model: Model, modality: str, field: str | None, features: FeatureKind
    ) -> tuple[Tensor, list[str], list[str]]:
        """One embedding a picture. Raises `UserError` for a field: files have none."""
        if field is not None:
            raise UserError(f"{self.folder}: the files of a folder have no field {field!r}")
        keys: list[str] = []
        bad: list[str] = []

        def items() -> Iterator[Any]:
            for key in self.keys:
                try:
                    item = self._read(model, modality, key)
                except BadSample as error:
                    bad.append(f"{self.folder / key}: {error}")
                    continue
                keys.append(key)
                yield item

        return model.encode(modality, items(), features=features), keys, bad

    def read(self, model: Model, modality: str, wanted: Sequence[Place]) -> dict[Place, Any]:
        """The pictures; nothing for another modality."""
        found = {}
        for key, number in wanted:
            try:
                found[key, number] = self._read(model, modality, key)
            except BadSample:
                continue
        return found

    def _read(self, model: Model, modality: str, key: str) -> Any:
        """Raises `BadSample`."""
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
        """Names, sizes and times of change."""
        return stamps(self.folder / key for key in self.keys)


class Samples(Collection):
    """The samples of WebDataset shards or of another source, by their keys. A sample may have several items."""

    def __init__(self, name: str, source: Iterable[Sample], title: str | None = None) -> None:
        self.samples = EvaluationSet("collection", source)
        self.name, self.title = name, name if title is None else title

    def embed(
        self, model: Model, modality: str, field: str | None, features: FeatureKind
    ) -> tuple[Tensor, list[str], list[str]]:
        """One embedding an item."""
        embedded, owners = self.samples.embeddings(model, modality, field, features=features)
        names = [str(sample["__key__"]) for sample in self.samples]
        bad = [f"{skipped.url}: sample {skipped.key!r}: {skipped.reason}" for skipped in self.samples.skipped.values()]
        return embedded, [names[owner] for owner in owners.tolist()], bad

    def read(self, model: Model, modality: str, wanted: Sequence[Place]) -> dict[Place, Any]:
        """Reads the shards again, up to the last of the places."""
        missing, keys = set(wanted), {key for key, _ in wanted}
        seen: Counter[str] = Counter()
        found: dict[Place, Any] = {}
        for sample in self.samples:
            if (key := str(sample["__key__"])) not in keys:
                continue
            try:
                items = model.augment[modality].decode(sample)
            except BadSample:
                continue
            for item in items:
                place = (key, seen[key])
                seen[key] += 1
                if place in missing:
                    missing.discard(place)
                    found[place] = item
            if not missing:
                break
        return found

    def fingerprint(self) -> str:
        """Of shards their names, and sizes and times of change of the local ones; of others what they say, or hold."""
        return fingerprint(self.samples.source)


class _All:
    """The samples of several sets, one behind the other."""

    def __init__(self, parts: Iterable[Iterable[Sample]]) -> None:
        self.parts = list(parts)

    def __iter__(self) -> Iterator[Sample]:
        return chain.from_iterable(self.parts)

    def fingerprint(self) -> str:
        """Those of the parts."""
        return "\n".join(fingerprint(part) for part in self.parts)


def collect(source: str, split: str, registry: Registry) -> Collection:
    """A collection from what a user names: a folder, shards (wildcards and braces), a source's name (`emoji`), or a
    source with options as in a recipe (`{name: webdataset, test: x.tar}`), of which `split` is taken.

    Raises `UserError` with what to write instead.
    """  # fmt: skip
    if Path(source).is_dir():
        return Folder(Path(source))
    called = source
    known = [name for kind, name in registry.entries if kind == "source"]
    if source in known:
        source = f"{{name: {source}}}"
    if not _is_node(source):
        if source.endswith(".tar") or "://" in source or source.startswith("pipe:"):
            shards = expand(source)
            return Samples("\n".join(shards), Shards(shards), source)
        raise UserError(
            f"{source!r} is no folder of pictures, no shard (*.tar), and no data source ({', '.join(known)})"
        )
    made = _source(read_document(source, "SOURCE"), registry)
    made.prepare()
    if shards := [shard for found in made.sets(split).values() for shard in found]:
        return Samples("\n".join(shards), Shards(shards), f"{called}, split {split}")
    if not (found := made.samples(split)):
        raise DataError(f"{source!r} has no split {split!r}")
    return Samples(f"{source} {split}", _All(found.values()), f"{called}, split {split}")


def _is_node(source: str) -> bool:
    """Whether it is a mapping; `{a,b}.tar` is a name with braces."""
    return source.startswith("{") and source.rstrip().endswith("}")


def _source(document: Document, registry: Registry) -> DataSource:
    """The data source that a recipe's `data.source` would be. Raises `RecipeErrors`."""
    if unset := document.expand():
        raise RecipeErrors(
            [
                f"{located(document.origin(path), path)}: the environment variable {name} is not set"
                for path, name in unset
            ]
        )
    options = dict(document.data)
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise RecipeErrors([f"{document.name}: needs a name: a data source, as {{name: ...}}"])
    try:
        cls: Any = registry.get("source", name).cls
    except KeyError as error:
        raise RecipeErrors([f"{document.name}: {error.args[0]}"]) from error
    try:
        made: DataSource = cls(cls.Config.model_validate_json(json.dumps(options)))
    except ValidationError as error:
        lines = []
        for item in error.errors(include_url=False):
            path, what = item["loc"], item["msg"]
            if item["type"] == "extra_forbidden":
                known = [field.alias or option for option, field in cls.Config.model_fields.items()]
                what = f"unknown option {path[-1]!r}{did_you_mean(str(path[-1]), known)}"
            lines.append(f"{located(document.origin(path), path)}: {what}")
        raise RecipeErrors(lines) from error
    return made
