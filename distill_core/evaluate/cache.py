"""Embeddings kept in a run folder, so that the same samples are encoded once by the same weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from hashlib import blake2b, sha256
from pathlib import Path

from torch import Tensor

from distill_core.batch import Sample, Skipped
from distill_core.data.opening import is_local
from distill_core.data.shards import Shards
from distill_core.model import Model
from distill_core.system.files import cannot_write, write_bytes


@dataclass(frozen=True)
class CachedEmbeddings:
    """Embeddings [N, D], their samples' numbers [N], and the samples that could not be read."""

    embedded: Tensor
    owners: Tensor
    skipped: Sequence[Skipped]


class EmbeddingCache:
    """Files of a folder, one for each set, side, modality and checkpoint; one is replaced when its samples change."""

    def __init__(
        self, folder: Path, whose: Callable[[Model, str], tuple[str, str]], warn: Callable[[str], None]
    ) -> None:
        """`whose` of a model and a modality: a name that stays, and a text that changes when the embeddings would."""
        self.folder, self._whose, self._warn = folder, whose, warn
        self._prints: dict[int, str] = {}

    def read(
        self, name: str, source: Iterable[Sample], model: Model, modality: str, field: str | None, features: str
    ) -> CachedEmbeddings | None:
        """What `write` has kept, where nothing has changed since."""
        from safetensors import SafetensorError, safe_open

        path = self._path(name, source, model, modality, field, features)[0]
        try:
            with safe_open(path, framework="pt") as file:
                skipped = [Skipped(*row) for row in json.loads((file.metadata() or {})["skipped"])]
                return CachedEmbeddings(file.get_tensor("embeddings"), file.get_tensor("samples"), skipped)
        except (OSError, SafetensorError, KeyError, ValueError):  # not there, or cut off: made again
            return None

    def write(
        self,
        kept: CachedEmbeddings,
        name: str,
        source: Iterable[Sample],
        model: Model,
        modality: str,
        field: str | None,
        features: str,
    ) -> None:
        """Keep embeddings, and drop what an earlier state of the same samples has left."""
        from safetensors.torch import save

        path, stays = self._path(name, source, model, modality, field, features)
        tensors = {"embeddings": kept.embedded.contiguous(), "samples": kept.owners.contiguous()}
        data = save(tensors, {"skipped": json.dumps([astuple(skipped) for skipped in kept.skipped])})
        try:
            self.folder.mkdir(exist_ok=True)
            write_bytes(path, data)
        except OSError as error:  # a run folder of somebody else's can be scored all the same
            self._warn(f"{cannot_write(path, error, len(data))}: embeddings are not kept")
            return
        for old in self.folder.glob(f"{stays}-*.safetensors"):
            if old != path:
                old.unlink(missing_ok=True)

    def _path(
        self, name: str, source: Iterable[Sample], model: Model, modality: str, field: str | None, features: str
    ) -> tuple[Path, str]:
        stays, changes = self._whose(model, modality)
        stays = _digest(stays, modality, str(field), features, name, type(source).__name__, _place(source))
        if id(source) not in self._prints:
            self._prints[id(source)] = fingerprint(source)
        return self.folder / f"{stays}-{_digest(changes, self._prints[id(source)])}.safetensors", stays


def fingerprint(source: Iterable[Sample]) -> str:
    """A text that changes when the samples do.

    Of shards their names, and sizes and times of change of the local ones; what `source.fingerprint()` says where it
    has one; else all that the samples hold is read.
    """
    if isinstance(source, Shards):
        remote = [shard for shard in source.names if not is_local(shard)]
        return "\n".join([*remote, stamps(Path(shard) for shard in source.names if is_local(shard))])
    if callable(own := getattr(source, "fingerprint", None)):
        return str(own())
    held = sha256()
    for sample in source:
        for field in sorted(sample):
            held.update(repr((field, sample[field])).encode())
    return held.hexdigest()


def stamps(paths: Iterable[Path]) -> str:
    """Names, sizes and times of change of files."""

    def lines() -> Iterator[str]:
        for path in paths:
            try:
                found = path.stat()
            except OSError:  # whoever reads it will say so
                yield f"{path} cannot be read"
            else:
                yield f"{path} {found.st_size} {found.st_mtime_ns}"

    return "\n".join(lines())


def identities(
    recipe: Mapping[str, object], models: Mapping[str, Model], checkpoint: str, digest: str
) -> Callable[[Model, str], tuple[str, str]]:
    """`whose` of an `EmbeddingCache`, for the sides of a run; `recipe` is the resolved one as plain data.

    `checkpoint` is the name of the file that the models were loaded from, `digest` that of what it held then.
    """
    sides = {id(model): side for side, model in models.items()}

    def whose(model: Model, modality: str) -> tuple[str, str]:
        parts = {part: recipe[part][modality] for part in ("augment", "backbone")}  # type: ignore[index]
        made_by = json.dumps([parts, model.precision, model.device.type], sort_keys=True)
        return f"{checkpoint} {sides[id(model)]}", f"{digest}\n{made_by}"

    return whose


def _place(source: Iterable[Sample]) -> str:
    return "\n".join(source.names) if isinstance(source, Shards) else str(getattr(source, "place", ""))


def _digest(*parts: str) -> str:
    return blake2b("\n".join(parts).encode(), digest_size=8).hexdigest()
