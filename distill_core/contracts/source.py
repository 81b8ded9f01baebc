"""The data source's contract."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar

from distill_core.batch import Sample
from distill_core.contracts.component import Component
from distill_core.data.shard import Shard, Shards


class DataSource(Component, ABC):
    """Where shards come from."""

    kind = "source"
    trainable: ClassVar[bool] = True
    """False for a source without shards: evaluations read its `samples`, and nothing can be trained on it."""

    def __init__(self, config: Any) -> None:
        self.config = config

    @classmethod
    def splits(cls, config: Any) -> tuple[str, ...] | None:
        """The splits it has, if its options tell: a recipe that uses another is refused at once."""
        return None

    def prepare(self) -> None:
        """Write what must be written once (a cache), with a progress bar. Raises `DataError`."""

    @abstractmethod
    def sets(self, split: str) -> dict[str, list[Shard]]:
        """The shards of a split (`train`, `validation`, `test`), by set; {} where it has no such split. The same ones,
        in the same order, whenever it is asked.

        Training pools the sets; evaluations score each by itself. Raises `DataError`.
        """

    def samples(self, split: str) -> dict[str, Iterable[Sample]]:
        """What evaluations read of a split, by set; each is read again and again. {} where it has no such split.

        The samples of the shards, unless a source that has none (`trainable = False`) overrides it: its `sets` is {}.
        Samples have a `__key__`, a `__url__` (the file), and bytes by field; they may be mappings that
        open a file when a field is asked for, and raise `BadSample` then. What is returned may have a `fingerprint()`,
        a text that changes when its samples do, which kept embeddings are looked up by. Raises `DataError`.
        """
        return {name: Shards(shards) for name, shards in self.sets(split).items()}
