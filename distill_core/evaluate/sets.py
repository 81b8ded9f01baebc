"""One set of evaluation samples: what each modality reads of it, and its embeddings, each made once."""

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
from distill_core.system import distributed
from distill_core.system.prefetch import prefetch_map
from distill_core.system.process import reading_threads

Step = TypeVar("Step")

Watch = Callable[[Iterable[Any], str], Iterable[Any]]
"""(samples or steps, what they are for) -> the same samples, each reported to a progress bar as it is taken."""


class EvaluationSet:
    """Samples, numbered in order. Tasks share the embeddings made here; items are not kept."""

    def __init__(
        self,
        name: str,
        source: Iterable[Sample],
        *,
        others: Callable[[str], list[EvaluationSet]] | None = None,
        cache: EmbeddingCache | None = None,
        watch: Watch | None = None,
    ) -> None:
        """`source` is read again and again: a list of samples, `Shards`, ...

        `others` opens the sets of another split of the same data; `cache` keeps embeddings between processes.
        """
        self.name = name
        self.source = source
        self._others, self._cache, self._watch = others, cache, watch
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
        """The sets of another split of the same data, for tasks that learn from it. Every rank must ask.

        Raises `DataError` where there is none. A task says in `reads` that it will ask.
        """
        if self._others is None:
            raise DataError(f"evaluation set {self.name!r} stands alone: it has no split {split!r}")
        return self._others(split)

    def warn(self, line: str) -> None:
        """Tell the user, once, why scores on this set say less than they seem to. The scores are kept."""
        if line not in self.warnings:
            self.warnings.append(line)

    def watch(self, steps: Iterable[Step], what: str) -> Iterable[Step]:
        """The steps of a task's work on this set, each reported to a progress bar as it is taken."""
        return steps if self._watch is None else self._watch(steps, what)

    def labels(self, field: str) -> dict[int, str]:
        """Sample's number -> its class, from the sample's `field`, or that of its `json`; samples without are left out,
        those whose field cannot be read are `skipped`, too.

        Read without any modality's help, so that a recipe needs none that reads words.
        """
        found = {}
        for i, sample in enumerate(self):
            try:
                label = _label(sample, field)
            except (BadSample, ValueError, AttributeError, RecursionError) as error:
                key = sample["__key__"]
                self.skipped[key, field] = Skipped(key, str(sample["__url__"]), f"{field}: cannot be read: {error}")
                continue
            if label is not None:
                found[i] = label
                self.identities[i] = str(sample["__key__"]), str(sample["__url__"])
        return found

    def samples(self, numbers: Sequence[int]) -> dict[int, Sample]:
        """These samples by number, undecoded."""
        wanted, found = set(numbers), {}
        for i, sample in enumerate(self):
            if i in wanted:
                found[i] = sample
            if len(found) == len(wanted):
                break
        return found

    def share(self, what: str) -> Iterator[tuple[int, Sample]]:
        """(number, sample) of this rank's share, every world-size-th; `what` says so where a bar shows them as read."""
        rank, world = distributed.rank(), distributed.world_size()
        for i, sample in enumerate(self.watch(self.source, what)):
            if i % world == rank:
                yield i, sample

    def items(
        self, model: Model, modality: str, field: str | None = None, *, share: bool = False
    ) -> Iterator[tuple[int, Any]]:
        """(number of the sample, item) of one modality, read anew. Samples that cannot be read have none.

        With `share`, only those of this rank's share of the samples.
        """
        augment = model.augment[modality]

        def read(numbered: tuple[int, Sample]) -> tuple[int, list[Any] | Skipped]:
            i, sample = numbered
            try:
                return i, augment.decode(sample, field)
            except BadSample as error:
                return i, Skipped(sample["__key__"], str(sample["__url__"]), f"{modality}: {error}")

        samples = self.share(f"{modality} of {self.name}") if share else enumerate(self)
        for i, found in prefetch_map(read, samples, reading_threads(model.device)):
            if isinstance(found, Skipped):
                self.skipped[found.key, modality] = found
                continue
            for item in found:
                yield i, item

    def embeddings(
        self, model: Model, modality: str, field: str | None = None, *, features: FeatureKind = "embedding"
    ) -> tuple[Tensor, Tensor]:
        """L2-normalised embeddings [N, D] of the items, and their samples' numbers [N], in the order of the samples.

        Or other `features` of theirs, as `Model.encode` has them; a task that compares nothing across modalities takes
        `Model.default_features`.

        Each rank encodes its share; all ranks get all of them, so every rank must ask. Raises `UserError` on every rank
        when one cannot go on, and where pictures, which are made on rank 0 alone, ask for what `run` did not.
        """
        key = (id(model), modality, field, features)
        if key not in self._embedded:
            if self.alone and distributed.world_size() > 1:
                raise UserError(
                    f"pictures ask for embeddings of {modality!r} that no score has made, which takes all ranks; "
                    "ask for them in `run` too"
                )
            if (kept := self._kept(model, modality, field, features)) is None:
                kept = self._encode(model, modality, field, features)
            self.skipped |= {(skipped.key, modality): skipped for skipped in kept.skipped}
            self._embedded[key] = kept.embedded, kept.owners
        return self._embedded[key]

    def _kept(self, model: Model, modality: str, field: str | None, features: FeatureKind) -> CachedEmbeddings | None:
        """The cached embeddings, if every rank has them, else None."""
        if self._cache is None:
            return None
        cache = self._cache
        found = distributed.raise_on_all_ranks(
            lambda: cache.read(self.name, self.source, model, modality, field, features)
        )
        return found if all(distributed.gather_objects(found is not None)) else None

    def _encode(self, model: Model, modality: str, field: str | None, features: FeatureKind) -> CachedEmbeddings:
        parts = distributed.gather_objects(
            distributed.raise_on_all_ranks(lambda: self._share(model, modality, field, features))
        )
        embedded, owners = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
        order = torch.argsort(owners, stable=True)
        skipped = [skipped for part in parts for (_, of), skipped in part[2].items() if of == modality]
        kept = CachedEmbeddings(embedded[order], owners[order], skipped)
        if self._cache is not None and distributed.rank() == 0:
            self._cache.write(kept, self.name, self.source, model, modality, field, features)
        return kept

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
    """The embeddings of items [N] that every rank has, each rank encoding its share -> [N, D]. Every rank must ask.

    Raises `UserError` on every rank when one cannot go on.
    """
    rank, world = distributed.rank(), distributed.world_size()
    mine = distributed.raise_on_all_ranks(lambda: model.encode(modality, items[rank::world], features="embedding"))
    if world == 1:
        return mine
    parts = distributed.gather_objects(mine)
    embedded: Tensor = parts[0].new_empty(len(items), parts[0].shape[1])
    for i, part in enumerate(parts):
        embedded[i::world] = part
    return embedded


def _label(sample: Sample, field: str) -> str | None:
    """Raises ValueError, AttributeError, RecursionError or `BadSample` for what is no text, or no json object."""
    if field in sample:
        found = sample[field]
        if isinstance(found, bytes | bytearray | memoryview):
            found = bytes(found).decode()
        elif not isinstance(found, str | int):
            raise ValueError(f"holds no text but a {type(found).__name__}")
    else:
        found = json.loads(sample["json"]).get(field) if "json" in sample else None
    return str(found).strip() or None if isinstance(found, str | int) else None
