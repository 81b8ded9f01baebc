"""One set of evaluation samples: what each modality reads of it, and its embeddings, each made once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from distill_core import distributed
from distill_core.errors import BadSample, UserError
from distill_core.model import Model
from distill_core.types import Sample, Skipped


class EvaluationSet:
    """Samples, numbered in order. Tasks share the embeddings made here; items are not kept."""

    def __init__(self, name: str, source: Iterable[Sample]) -> None:
        """`source` is read again and again: a list of samples, `Shards`, ..."""
        self.name = name
        self.source = source
        self.skipped: dict[tuple[str, str], Skipped] = {}
        """By (sample key, modality): items that could not be read, and why."""
        self.alone = False
        """Whether this rank works while the others do not: no embeddings can be made then, where there are several."""
        self._embedded: dict[tuple[int, str, str | None], tuple[Tensor, Tensor]] = {}

    def __iter__(self) -> Iterator[Sample]:
        yield from self.source

    def samples(self, numbers: Sequence[int]) -> dict[int, Sample]:
        """These samples by number, undecoded."""
        wanted, found = set(numbers), {}
        for i, sample in enumerate(self):
            if i in wanted:
                found[i] = sample
            if len(found) == len(wanted):
                break
        return found

    def items(
        self, model: Model, modality: str, field: str | None = None, *, share: bool = False
    ) -> Iterator[tuple[int, Any]]:
        """(number of the sample, item) of one modality, read anew. Samples that cannot be read have none.

        With `share`, only those of this rank's share of the samples: every world-size-th.
        """
        rank, world = (distributed.rank(), distributed.world_size()) if share else (0, 1)
        for i, sample in enumerate(self):
            if i % world != rank:
                continue
            try:
                found = model.augment[modality].read(sample, field)
            except BadSample as error:
                key = sample["__key__"]
                self.skipped[key, modality] = Skipped(key, str(sample["__url__"]), f"{modality}: {error}")
                continue
            for item in found:
                yield i, item

    def embeddings(self, model: Model, modality: str, field: str | None = None) -> tuple[Tensor, Tensor]:
        """L2-normalised embeddings [N, D] of the items, and their samples' numbers [N], in the order of the samples.

        Each rank encodes its share; all ranks get all of them, so every rank must ask. Raises `UserError` on every rank
        when one cannot go on, and where pictures, which are made on rank 0 alone, ask for what `run` did not.
        """
        key = (id(model), modality, field)
        if key not in self._embedded:
            if self.alone and distributed.world_size() > 1:
                raise UserError(
                    f"pictures ask for embeddings of {modality!r} that no score has made, which takes all ranks; "
                    "ask for them in `run` too"
                )
            parts = distributed.gather_objects(self._share(model, modality, field))
            for part in parts:
                if isinstance(part, UserError):
                    raise part
                self.skipped |= part[2]
            embedded, owners = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
            order = torch.argsort(owners, stable=True)
            self._embedded[key] = embedded[order], owners[order]
        return self._embedded[key]

    def _share(
        self, model: Model, modality: str, field: str | None
    ) -> tuple[Tensor, Tensor, dict[tuple[str, str], Skipped]] | UserError:
        """This rank's embeddings, their samples' numbers and what was skipped, or why there are none."""
        owners: list[int] = []

        def items() -> Iterator[Any]:
            for owner, item in self.items(model, modality, field, share=True):
                owners.append(owner)
                yield item

        try:
            embedded = model.encode(modality, items())
        except UserError as error:
            return error
        return embedded, torch.tensor(owners, dtype=torch.long), dict(self.skipped)
