"""The data source that puts others together."""

from __future__ import annotations

from collections.abc import Iterable, Sized
from typing import Annotated

from pydantic import Field

from distill_core.batch import Sample
from distill_core.contracts.component import ComponentConfig
from distill_core.contracts.slot import Slot
from distill_core.contracts.source import DataSource
from distill_core.data.shard import Shard


class MixtureConfig(ComponentConfig):
    """`data.weights` says how much of each is trained on, `data.batches` whether a step mixes them."""

    of: Annotated[dict[str, Slot[DataSource]], Field(min_length=1)]
    """Name -> source."""


class MixtureSource(DataSource):
    """The sets of several sources, each by its source's name; those of a source with several as NAME-SET."""

    name = "mixture"
    Config = MixtureConfig
    examples = ({"of": {"one": {"name": "webdataset", "urls": "no-such-folder/{00..03}.tar"}}},)

    def __init__(self, config: MixtureConfig) -> None:
        super().__init__(config)
        self.sources = {name: slot.build() for name, slot in config.of.items()}

    @classmethod
    def splits(cls, config: MixtureConfig) -> tuple[str, ...] | None:
        """Those that any of its sources has."""
        splits = [slot.cls.splits(slot.config) for slot in config.of.values()]
        if None in splits:
            return None
        return tuple(dict.fromkeys(split for names in splits for split in names or ()))

    def prepare(self) -> None:
        """Each of its sources."""
        for source in self.sources.values():
            source.prepare()

    def sets(self, split: str) -> dict[str, list[Shard]]:
        """Of the sources that have the split."""
        return {
            _name(name, key, sets): shards
            for name, source in self.sources.items()
            for sets in [source.sets(split)]
            for key, shards in sets.items()
        }

    def samples(self, split: str) -> dict[str, Iterable[Sample]]:
        """Of the sources that have the split."""
        return {
            _name(name, key, sets): samples
            for name, source in self.sources.items()
            for sets in [source.samples(split)]
            for key, samples in sets.items()
        }


def _name(source: str, own: str, sets: Sized) -> str:
    return source if len(sets) == 1 else f"{source}-{own}"
