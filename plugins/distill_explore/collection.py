"""What is embedded and searched: a folder of pictures, WebDataset shards, or a data source as a recipe names it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from torch import Tensor

from distill_core.components import DataSource
from distill_core.data.shards import check, expand, is_local
from distill_core.errors import BadSample, DataError, UserError
from distill_core.evaluate.sets import EvaluationSet
from distill_core.model import Model
from distill_core.registry import Registry

PICTURES = (".jpg", ".jpeg", ".png", ".webp")


class Collection(ABC):
    """Items with keys."""

    @abstractmethod
    def embed(self, model: Model, modality: str, field: str | None) -> tuple[Tensor, list[str], list[str]]:
        """Embeddings [N, D], the key of each, and a line for each item that cannot be read. Raises `DataError`."""

    @abstractmethod
    def read(self, model: Model, modality: str, keys: Sequence[str], field: str | None = None) -> dict[str, Any]:
        """The first item of each of these keys, as it is; keys without one are left out."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A text that changes when the collection does."""


class Folder(Collection):
    """The pictures below a folder; keys are paths inside it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        found = (path for path in folder.rglob("*") if path.suffix.lower() in PICTURES and path.is_file())
        self.keys = sorted(path.relative_to(folder).as_posix() for path in found)
        if not self.keys:
            raise DataError(f"{folder}: holds no picture ({', '.join(PICTURES)}); for shards, name the tar files")

    def embed(self, model: Model, modality: str, field: str | None) -> tuple[Tensor, list[str], list[str]]:
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

        return model.encode(modality, items()), keys, bad

    def read(self, model: Model, modality: str, keys: Sequence[str], field: str | None = None) -> dict[str, Any]:
        """The pictures; nothing for another modality."""
        found = {}
        for key in keys:
            try:
                found[key] = self._read(model, modality, key)
            except BadSample:
                continue
        return found

    def _read(self, model: Model, modality: str, key: str) -> Any:
        """Raises `BadSample`."""
        path = self.folder / key
        sample = {"__key__": key, "__url__": str(path), path.suffix[1:].lower(): path.read_bytes()}
        return model.augment[modality].read(sample)[0]

    def fingerprint(self) -> str:
        """Names, sizes and times of change."""
        return _stamps(self.folder / key for key in self.keys)


class Shards(Collection):
    """The samples of WebDataset shards, by their keys. A sample may have several items."""

    def __init__(self, shards: Sequence[str]) -> None:
        check(shards)
        self.samples = EvaluationSet("collection", shards)

    def embed(self, model: Model, modality: str, field: str | None) -> tuple[Tensor, list[str], list[str]]:
        """One embedding an item."""
        embedded, owners = self.samples.embeddings(model, modality, field)
        names = [str(sample["__key__"]) for sample in self.samples]
        bad = [f"{skipped.url}: sample {skipped.key!r}: {skipped.reason}" for skipped in self.samples.skipped.values()]
        return embedded, [names[owner] for owner in owners.tolist()], bad

    def read(self, model: Model, modality: str, keys: Sequence[str], field: str | None = None) -> dict[str, Any]:
        """Reads the shards again, up to the last of the keys."""
        wanted = set(keys)
        found: dict[str, Any] = {}
        for sample in self.samples:
            if (key := str(sample["__key__"])) in wanted:
                wanted.discard(key)
                try:
                    found[key] = model.augment[modality].read(sample, field)[0]
                except BadSample:
                    continue
            if not wanted:
                break
        return found

    def fingerprint(self) -> str:
        """Names, and of local shards sizes and times of change."""
        remote = [shard for shard in self.samples.shards if not is_local(shard)]
        return "\n".join([*remote, _stamps(Path(shard) for shard in self.samples.shards if is_local(shard))])


def _stamps(paths: Iterator[Path]) -> str:
    return "\n".join(f"{path} {stat.st_size} {stat.st_mtime_ns}" for path in paths for stat in [path.stat()])


def collect(source: str, split: str, registry: Registry) -> Collection:
    """A collection from what a user names: a folder, shards (wildcards and braces), a source's name (`emoji`), or a
    source with options as in a recipe (`{name: webdataset, test: x.tar}`), of which `split` is taken.

    Raises `UserError` with what to write instead.
    """  # fmt: skip
    if Path(source).is_dir():
        return Folder(Path(source))
    if source.endswith(".tar") or "://" in source or source.startswith("pipe:"):
        return Shards(expand(source))
    known = [name for kind, name in registry.entries if kind == "source"]
    try:
        node = yaml.safe_load(source)
    except yaml.YAMLError as error:
        raise UserError(f"--in {source!r}: {str(error).splitlines()[0]}") from error
    node = {"name": node} if isinstance(node, str) else node
    if not isinstance(node, dict) or node.get("name") not in known:
        raise UserError(
            f"{source!r} is no folder of pictures, no shard (*.tar), and no data source ({', '.join(known)})"
        )
    cls: Any = registry.get("source", node.pop("name")).cls
    try:
        made: DataSource = cls(cls.Config.model_validate(node))
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{source!r}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    made.prepare()
    shards = [shard for found in made.sets(split).values() for shard in found]
    if not shards:
        raise DataError(f"{source!r} has no split {split!r}")
    return Shards(shards)
