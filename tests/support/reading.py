"""Small shards, read in tests as a loader's worker reads them."""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from distill_core.batch import Sample, Skipped, View
from distill_core.contracts.source import DataSource
from distill_core.data.batches import BatchReader, Item, SampleViews
from distill_core.data.lengths import measure
from distill_core.data.order import ShuffledOrder
from distill_core.data.shard import Patience, Shard
from distill_core.data.tar_shards import TarShard

Write = Callable[..., list[Path]]
QUICK = Patience(retries=2, timeout=1.5)
"""What stalls is given up after this; on a busy machine what does not may take a while, too."""


class TellEpoch(SampleViews):
    """In place of a sample's views: the epoch that it is read in. As any augmentation, it looks at the sample."""

    def __init__(self) -> None:
        super().__init__({}, seed=0)

    def __call__(self, sample: Sample, epoch: int, repeat: tuple[int, ...] = ()) -> dict[str, list[View]]:
        assert "none" not in sample
        return {"epoch": [View(epoch)]}


def reader_of(
    shards: Sequence[Path | str | Shard],
    views: SampleViews | None = None,
    *,
    shuffle: int = 5,
    streams: int = 3,
    seed: int = 3,
    patience: Patience = QUICK,
) -> BatchReader:
    made = [shard if isinstance(shard, Shard) else TarShard(shard) for shard in shards]
    lengths = measure(made, patience, resuming=True)
    order = ShuffledOrder(lengths.samples, seed=seed, streams=streams, shuffle=shuffle)
    return BatchReader(made, lengths.samples, order, views or TellEpoch(), _no_batch, patience=patience)


def _no_batch(items: Sequence[Item], fillers: Mapping[str, Item]) -> Any:
    raise AssertionError("items are asked for here, not batches")


def passes(reader: BatchReader, count: int = 1, start: int = 0) -> list[list[Item]]:
    """The items of some passes, by the pass in which they are due."""
    size = reader.order.samples
    return [
        [reader.item(position) for position in range(n * size, (n + 1) * size)] for n in range(start, start + count)
    ]


def size_of(source: DataSource, split: str) -> int:
    """Samples of a split."""
    return sum(len(shard) for shards in source.sets(split).values() for shard in shards)


def skipped_in(items: Sequence[Item]) -> list[Skipped]:
    return [skip for item in items for skip in item.skipped]


def keys_in(shards: Sequence[Path]) -> list[str]:
    """As tarfile lists them: no webdataset, none of our reading."""
    keys = []
    for shard in shards:
        with tarfile.open(shard) as tar:
            keys += [name.removesuffix(".png") for name in tar.getnames() if name.endswith(".png")]
    return keys
