"""Streams of small shards, read in tests."""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

from distill_core.batch import Sample, View
from distill_core.data.stream import Item, SampleViews, ShardStream

Write = Callable[..., list[Path]]


class TellEpoch(SampleViews):
    """In place of a sample's views: the epoch that it is read in. As any augmentation, it looks at the sample."""

    def __init__(self) -> None:
        super().__init__({}, seed=0)

    def __call__(self, sample: Sample, epoch: int, repeat: int = 0) -> dict[str, list[View]]:
        assert "none" not in sample
        return {"epoch": [View(epoch)]}


def stream_of(shards: list[Path], views: Any = None, *, shuffle: int = 5, seed: int = 3, **options: Any) -> ShardStream:
    return ShardStream([str(shard) for shard in shards], views or TellEpoch(), seed=seed, shuffle=shuffle, **options)


def take(stream: ShardStream, count: int) -> list[Item]:
    items = list(islice(iter(stream), count))
    assert all(isinstance(item, Item) for item in items), items
    return items  # type: ignore[return-value]


def epochs_of(stream: ShardStream, epochs: int) -> list[list[str]]:
    """The keys of the first `epochs` epochs of one stream, in the order they come."""
    found: list[list[str]] = [[] for _ in range(epochs)]
    for item in stream:
        assert isinstance(item, Item), item
        epoch = item.views["epoch"][0].data
        if epoch == epochs:
            break
        found[epoch].append(item.key)
    return found


def keys_in(shards: list[Path]) -> list[str]:
    """As tarfile lists them: no webdataset, none of our reading."""
    keys = []
    for shard in shards:
        with tarfile.open(shard) as tar:
            keys += [name.removesuffix(".png") for name in tar.getnames() if name.endswith(".png")]
    return keys
