"""One set of evaluation samples: what each modality reads of it, and its embeddings, each made once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from distill_core.data.shards import read_shard
from distill_core.errors import BadSample
from distill_core.model import Model
from distill_core.types import Sample


class EvaluationSet:
    """The samples of some shards, numbered in order. Tasks share what is read and embedded here."""

    def __init__(self, name: str, shards: Sequence[str]) -> None:
        self.name = name
        self.shards = list(shards)
        self._items: dict[tuple[str, str | None], tuple[list[Any], list[int]]] = {}
        self._embedded: dict[tuple[int, str, str | None], Tensor] = {}

    def __iter__(self) -> Iterator[Sample]:
        for shard in self.shards:
            yield from read_shard(shard)

    def items(self, model: Model, modality: str, field: str | None = None) -> tuple[list[Any], Tensor]:
        """All items of one modality, and the number of the sample that each belongs to, [N].

        Samples whose modality cannot be read have none.
        """
        key = (modality, field)
        if key not in self._items:
            items: list[Any] = []
            owners: list[int] = []
            for i, sample in enumerate(self):
                try:
                    found = model.augment[modality].read(sample, field)
                except BadSample:
                    continue
                items += found
                owners += [i] * len(found)
            self._items[key] = (items, owners)
        items, owners = self._items[key]
        return items, torch.tensor(owners, dtype=torch.long)

    def embeddings(self, model: Model, modality: str, field: str | None = None) -> tuple[Tensor, Tensor]:
        """L2-normalised embeddings [N, D] of `items`, and their samples' numbers [N]."""
        items, owners = self.items(model, modality, field)
        key = (id(model), modality, field)
        if key not in self._embedded:
            self._embedded[key] = model.encode(modality, items)
        return self._embedded[key], owners
