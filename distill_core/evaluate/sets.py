"""A set of evaluation samples: the items that each modality reads from it, and their embeddings, computed once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from distill_core.batch import Sample, Skipped
from distill_core.errors import BadSample, DataError, UserError
from distill_core.evaluate.cache import CachedEmbeddings, EmbeddingCache
from distill_core.model import FeatureKind, Model
from distill_core.plan import joined
from distill_core.system import distributed
from distill_core.system.prefetch import prefetch_map
from distill_core.system.process import reading_threads

Step = TypeVar("Step")

Watch = Callable[[Iterable[Any], str], Iterable[Any]]
"""(samples or steps, what they are for) -> the same samples, each reported to a progress bar as it is consumed."""


class EvaluationSet:
    """Samples, numbered in order. Tasks share the embeddings computed here; items are not kept in memory."""

    def __init__(
        self,
        name: str,
        source: Iterable[Sample],
        *,
        open_split: Callable[[str], list[EvaluationSet]] | None = None,
        cache: EmbeddingCache | None = None,
        watch: Watch | None = None,
    ) -> None:
        """`source` is iterated several times: a list of samples, `Shards`, ...

        `open_split` opens the sets of another split of the same data; `cache` keeps embeddings between processes.
        """
        self.name = name
        self.source = source
        self._open_split, self._cache, self._watch = open_split, cache, watch
        self.skipped: dict[tuple[str, str], Skipped] = {}
        """By (sample key, modality): items that could not be read, and why."""
        self.warnings: list[str] = []
        """See `warn`."""
        self.identities: dict[int, tuple[str, str]] = {}
        """Sample number -> (key, file) of samples read by `labels`; other sets may contain the same ones."""
        self.alone = False
        """Whether this rank works while the others wait. With several ranks, no embeddings can be made then."""
        self._embedded: dict[tuple[int, str, str | None, FeatureKind], tuple[Tensor, Tensor]] = {}

    def __iter__(self) -> Iterator[Sample]:
        yield from self.source

    def of_split(self, split: str) -> list[EvaluationSet]:
        """The sets of another split of the same data, for tasks that learn from it. Every rank must call this.

        Raises `DataError` if there is none. A task that calls this names the split in `reads`.
        """
        if self._open_split is None:
            raise DataError(f"evaluation set {self.name!r} stands alone: it has no split {split!r}")
        return self._open_split(split)

    def warn(self, line: str) -> None:
        """Tell the user, once, why scores on this set are less reliable than they seem. The scores are kept."""
        if line not in self.warnings:
            self.warnings.append(line)

    def watch(self, steps: Iterable[Step], what: str) -> Iterable[Step]:
        """The steps of a task's work on this set, each reported to a progress bar as it is consumed."""
        return steps if self._watch is None else self._watch(steps, what)

    def labels(self, field: str) -> dict[int, str]:
        """Sample number -> class, from the sample's `field`, or that field of its `json`. Samples without one are left
        out; those whose field cannot be read are also listed in `skipped`.

        No modality is involved, so a recipe without a text modality has labels too.
        """
        labels = {}
        for i, sample in enumerate(self):
            try:
                label = _label(sample, field)
            except (BadSample, ValueError, AttributeError, RecursionError) as error:
                key = sample["__key__"]
                self.skipped[key, field] = Skipped(key, str(sample["__url__"]), f"{field}: cannot be read: {error}")
                continue
            if label is not None:
                labels[i] = label
                self.identities[i] = str(sample["__key__"]), str(sample["__url__"])
        return labels

    def samples(self, numbers: Sequence[int]) -> dict[int, Sample]:
        """These samples by number, undecoded."""
        remaining, samples = set(numbers), {}
        for i, sample in enumerate(self):
            if i in remaining:
                samples[i] = sample
            if len(samples) == len(remaining):
                break
        return samples

    def share(self, what: str) -> Iterator[tuple[int, Sample]]:
        """(number, sample) of this rank's share, every world-size-th sample; `what` labels the progress bar."""
        rank, world = distributed.rank(), distributed.world_size()
        for i, sample in enumerate(self.watch(self.source, what)):
            if i % world == rank:
                yield i, sample

    def items(
        self, model: Model, modality: str, field: str | None = None, *, share: bool = False
    ) -> Iterator[tuple[int, Any]]:
        """(number of the sample, item) of one modality, read again on each call. Unreadable samples have no items.

        With `share`, only those of this rank's share of the samples.
        """

        def decode(sample: Sample) -> list[Any]:
            names = joined(modality)
            if len(names) == 1:
                return model.augment[modality].decode(sample, field)
            own = {name: model.augment[name].decode(sample) for name in names}
            count = max(map(len, own.values()))  # one image with each of its captions
            if any(len(items) not in (1, count) for items in own.values()):
                raise BadSample(f"{', '.join(f'{len(x)} items of {n}' for n, x in own.items())} do not pair")
            return [{name: items[i % len(items)] for name, items in own.items()} for i in range(count)]

        def read(numbered: tuple[int, Sample]) -> tuple[int, list[Any] | Skipped]:
            i, sample = numbered
            try:
                return i, decode(sample)
            except BadSample as error:
                return i, Skipped(sample["__key__"], str(sample["__url__"]), f"{modality}: {error}")

        samples = self.share(f"{modality} of {self.name}") if share else enumerate(self)
        for i, items in prefetch_map(read, samples, reading_threads(model.device)):
            if isinstance(items, Skipped):
                self.skipped[items.key, modality] = items
                continue
            for item in items:
                yield i, item

    def embeddings(
        self, model: Model, modality: str, field: str | None = None, *, features: FeatureKind = "embedding"
    ) -> tuple[Tensor, Tensor]:
        """L2-normalised embeddings [N, D] of the items, and their samples' numbers [N], in the order of the samples.

        Or other `features`, as in `Model.encode`; a task that compares nothing across modalities takes
        `Model.default_features`.

        Each rank encodes its share and gets all embeddings, so every rank must call this. Raises `UserError` on every
        rank if one fails, and in `Task.media`, which only rank 0 runs, for embeddings that `run` did not compute.
        """
        key = (id(model), modality, field, features)
        if key not in self._embedded:
            if self.alone and distributed.world_size() > 1:
                raise UserError(
                    f"`media` needs embeddings of {modality!r} that `run` did not compute, which takes all ranks; "
                    "compute them in `run` too"
                )
            if (embeddings := self._cached(model, modality, field, features)) is None:
                embeddings = self._encode(model, modality, field, features)
            self.skipped |= {(skipped.key, modality): skipped for skipped in embeddings.skipped}
            self._embedded[key] = embeddings.embedded, embeddings.owners
        return self._embedded[key]

    def _cached(self, model: Model, modality: str, field: str | None, features: FeatureKind) -> CachedEmbeddings | None:
        """The cached embeddings, if every rank has them, else None."""
        if self._cache is None:
            return None
        cache = self._cache
        embeddings = distributed.raise_on_all_ranks(
            lambda: cache.read(self.name, self.source, model, modality, field, features)
        )
        return embeddings if all(distributed.gather_objects(embeddings is not None)) else None

    def _encode(self, model: Model, modality: str, field: str | None, features: FeatureKind) -> CachedEmbeddings:
        parts = distributed.gather_objects(
            distributed.raise_on_all_ranks(lambda: self._share(model, modality, field, features))
        )
        embedded, owners = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
        order = torch.argsort(owners, stable=True)
        skipped = [skipped for part in parts for (_, of), skipped in part[2].items() if of == modality]
        embeddings = CachedEmbeddings(embedded[order], owners[order], skipped)
        if self._cache is not None and distributed.rank() == 0:
            self._cache.write(embeddings, self.name, self.source, model, modality, field, features)
        return embeddings

    def _share(
        self, model: Model, modality: str, field: str | None, features: FeatureKind
    ) -> tuple[Tensor, Tensor, dict[tuple[str, str], Skipped]]:
        """This rank's embeddings, their samples' numbers and what was skipped."""
        owners: list[int] = []

        def items() -> Iterator[Any]:
            for owner, item in self.items(model, modality, field, share=True):
                owners.append(owner)
                yield item

        embedded = model.encode(modality, items(), features=features)
        return embedded, torch.tensor(owners, dtype=torch.long), dict(self.skipped)


def encode_shared(model: Model, modality: str, items: Sequence[Any]) -> Tensor:
    """The embeddings of items [N] that every rank has, each rank encoding its share -> [N, D]. Every rank must call it.

    Raises `UserError` on every rank if one fails.
    """
    rank, world = distributed.rank(), distributed.world_size()
    share = distributed.raise_on_all_ranks(lambda: model.encode(modality, items[rank::world], features="embedding"))
    if world == 1:
        return share
    parts = distributed.gather_objects(share)
    embedded: Tensor = parts[0].new_empty(len(items), parts[0].shape[1])
    for i, part in enumerate(parts):
        embedded[i::world] = part
    return embedded


def _label(sample: Sample, field: str) -> str | None:
    """Raises ValueError, AttributeError, RecursionError or `BadSample` for what is no text or no JSON object."""
    if field in sample:
        value = sample[field]
        if isinstance(value, bytes | bytearray | memoryview):
            value = bytes(value).decode()
        elif not isinstance(value, str | int):
            raise ValueError(f"holds no text but a {type(value).__name__}")
    else:
        value = json.loads(sample["json"]).get(field) if "json" in sample else None
    return str(value).strip() or None if isinstance(value, str | int) else None
