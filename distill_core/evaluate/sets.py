"""One set of evaluation samples: what each modality reads of it, and its embeddings, each made once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from distill_core.data.shards import read_shard
from distill_core.errors import BadSample
from distill_core.model import Model
from distill_core.types import Sample, Skipped


class EvaluationSet:
    """The samples of some shards, numbered in order. Tasks share the embeddings made here; items are not kept."""

    def __init__(self, name: str, shards: Sequence[str]) -> None:
        self.name = name
        self.shards = list(shards)
        self.skipped: dict[tuple[str, str], Skipped] = {}
        """By (sample key, modality): items that could not be read, and why."""
        self._embedded: dict[tuple[int, str, str | None], tuple[Tensor, Tensor]] = {}

    def __iter__(self) -> Iterator[Sample]:
        for shard in self.shards:
            yield from read_shard(shard)

    def items(self, model: Model, modality: str, field: str | None = None) -> Iterator[tuple[int, Any]]:
        """(number of the sample, item) of one modality, read anew. Samples that cannot be read have none."""
        for i, sample in enumerate(self):
            try:
                found = model.augment[modality].read(sample, field)
            except BadSample as error:
                key = sample["__key__"]
                self.skipped[key, modality] = Skipped(key, str(sample["__url__"]), f"{modality}: {error}")
                continue
            for item in found:
                yield i, item

    def embeddings(self, model: Model, modality: str, field: str | None = None) -> tuple[Tensor, Tensor]:
        """L2-normalised embeddings [N, D] of the items, and their samples' numbers [N]."""
        key = (id(model), modality, field)
        if key not in self._embedded:
            owners: list[int] = []

            def items() -> Iterator[Any]:
                for owner, item in self.items(model, modality, field):
                    owners.append(owner)
                    yield item

            embedded = model.encode(modality, items())
            self._embedded[key] = embedded, torch.tensor(owners, dtype=torch.long)
        return self._embedded[key]
