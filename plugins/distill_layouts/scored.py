"""Sources that are scored alone: they have no shards, so nothing can be trained on them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any

from distill_core import DataSource, Sample, Shard


class ScoredSource(DataSource):
    """Base: one split, which the option `split` names."""

    trainable = False

    @classmethod
    def splits(cls, config: Any) -> tuple[str, ...]:
        """The one of the option."""
        return (config.split,)

    def sets(self, split: str) -> dict[str, list[Shard]]:
        """None: it has no shards."""
        return {}

    def samples(self, split: str) -> dict[str, Iterable[Sample]]:
        """Samples of the split, by set. Raises `DataError`."""
        return self.scored() if split == self.config.split else {}

    @abstractmethod
    def scored(self) -> dict[str, Iterable[Sample]]:
        """The samples by set. Raises `DataError` for what is not as the layout has it."""
