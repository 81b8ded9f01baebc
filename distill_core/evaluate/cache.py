"""A cache of embeddings in a run folder: the same weights encode the same samples once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from hashlib import blake2b, sha256
from pathlib import Path

from torch import Tensor

from distill_core.batch import Sample, Skipped
from distill_core.model import Model
from distill_core.plan import joined
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
        self, folder: Path, identify: Callable[[Model, str], tuple[str, str]], warn: Callable[[str], None]
    ) -> None:
        """`identify` maps a model and a modality to a stable name, and a text that changes when embeddings would."""
        self.folder, self._identify, self._warn = folder, identify, warn
        self._prints: dict[int, str] = {}

    def read(
        self, name: str, source: Iterable[Sample], model: Model, modality: str, field: str | None, features: str
    ) -> CachedEmbeddings | None:
        """What `write` stored, if nothing has changed since; else None."""
        from safetensors import SafetensorError, safe_open

        path = self._path(name, source, model, modality, field, features)[0]
        try:
            with safe_open(path, framework="pt") as file:
                skipped = [Skipped(*row) for row in json.loads((file.metadata() or {})["skipped"])]
                return CachedEmbeddings(file.get_tensor("embeddings"), file.get_tensor("samples"), skipped)
        except (OSError, SafetensorError, KeyError, ValueError):  # absent or truncated: computed again
            return None

    def write(
        self,
        cached: CachedEmbeddings,
        name: str,
        source: Iterable[Sample],
        model: Model,
        modality: str,
        field: str | None,
        features: str,
    ) -> None:
        """Store embeddings, and delete those of an earlier state of the same samples."""
        from safetensors.torch import save

        path, prefix = self._path(name, source, model, modality, field, features)
        tensors = {"embeddings": cached.embedded.contiguous(), "samples": cached.owners.contiguous()}
        data = save(tensors, {"skipped": json.dumps([astuple(skipped) for skipped in cached.skipped])})
        try:
            self.folder.mkdir(exist_ok=True)
            write_bytes(path, data)
        except OSError as error:  # a run folder of somebody else's can be scored all the same
            self._warn(f"{cannot_write(path, error, len(data))}: embeddings are not cached")
            return
        for old in self.folder.glob(f"{prefix}-*.safetensors"):
            if old != path:
                old.unlink(missing_ok=True)

    def _path(
        self, name: str, source: Iterable[Sample], model: Model, modality: str, field: str | None, features: str
    ) -> tuple[Path, str]:
        prefix, version = self._identify(model, modality)
        prefix = _digest(prefix, modality, str(field), features, name, type(source).__name__, _place(source))
        if id(source) not in self._prints:
            self._prints[id(source)] = fingerprint(source)
        return self.folder / f"{prefix}-{_digest(version, self._prints[id(source)])}.safetensors", prefix


def fingerprint(source: Iterable[Sample]) -> str:
    """A text that changes when the samples do.

    `source.fingerprint()` where it has one, as shards have; else a digest of all that the samples hold.
    """
    if callable(method := getattr(source, "fingerprint", None)) and (text := method()) is not None:
        return str(text)
    digest = sha256()
    for sample in source:
        for field in sorted(sample):
            digest.update(repr((field, sample[field])).encode())
    return digest.hexdigest()


def stamps(paths: Iterable[Path]) -> str:
    """Names, sizes and modification times of files, a line each."""

    def lines() -> Iterator[str]:
        for path in paths:
            try:
                stat = path.stat()
            except OSError:  # reading it reports the error
                yield f"{path} cannot be read"
            else:
                yield f"{path} {stat.st_size} {stat.st_mtime_ns}"

    return "\n".join(lines())


def identities(
    recipe: Mapping[str, object], models: Mapping[str, Model], checkpoint: str, digest: str
) -> Callable[[Model, str], tuple[str, str]]:
    """The `identify` of an `EmbeddingCache` for the sides of a run; `recipe` is the resolved one as plain data.

    `checkpoint` is the name of the file that the models were loaded from, `digest` that of its content at that time.
    """
    sides = {id(model): side for side, model in models.items()}

    def identify(model: Model, modality: str) -> tuple[str, str]:
        names = dict.fromkeys([modality, *joined(modality)])
        parts = [recipe[part].get(name) for part in ("augment", "backbone") for name in names]  # type: ignore[attr-defined]
        made_by = json.dumps([parts, model.precision, model.device.type], sort_keys=True)
        return f"{checkpoint} {sides[id(model)]}", f"{digest}\n{made_by}"

    return identify


def _place(source: Iterable[Sample]) -> str:
    return str(getattr(source, "place", ""))


def _digest(*parts: str) -> str:
    return blake2b("\n".join(parts).encode(), digest_size=8).hexdigest()
