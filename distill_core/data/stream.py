"""An endless, shuffled stream of samples over shards whose exact state is a few integers.

The state of one stream (one loader worker of one rank) is the epoch, the shard, the offset in it, and *references* to
the samples in the shuffle buffer, never their bytes. A sample's views depend on (seed, epoch, sample key) alone.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from distill_core.components import Augmentation
from distill_core.data.shards import read_shard
from distill_core.errors import BadSample, DataError
from distill_core.types import Sample, Skipped, View


@dataclass(slots=True)
class Item:
    """One sample's views, and the samples that were passed over just before it."""

    key: str
    views: dict[str, list[View]]
    seed: int
    """For what its collators draw: a function of (seed, epoch, key), as the views are."""
    skipped: list[Skipped] = field(default_factory=list)
    measures: dict[str, Mapping[str, float]] = field(default_factory=dict)
    """By modality, of the first samples of each worker."""


@dataclass(slots=True)
class Failure:
    """What stops a stream; it travels in place of an item, so that a worker's error reaches the user as one line."""

    message: str


MANY = 1000
"""So many bad samples in a row, with no good one in a whole pass, say that the data does not fit the recipe."""


def number(*parts: Any) -> int:
    """A 63-bit hash of its arguments, the same in every process and release."""
    text = "\x1f".join(str(part) for part in parts)
    return int(struct.unpack("<Q", hashlib.blake2b(text.encode(), digest_size=8).digest())[0] >> 1)


MEASURED = 64
"""Samples that each worker measures."""


class SampleViews:
    """Raw sample -> the views of every modality. Picklable."""

    def __init__(self, augment: Mapping[str, Augmentation], seed: int) -> None:
        self.augment = dict(augment)
        self.seed = seed
        self.measured = 0

    def measure(self, sample: Sample) -> dict[str, Mapping[str, float]]:
        """What the augmentations measure of one of the first samples; {} of all others."""
        if self.measured == MEASURED:
            return {}
        self.measured += 1
        measures = {}
        for name, augmentation in self.augment.items():
            try:
                if measure := augmentation.measure(sample):
                    measures[name] = measure
            except BadSample:  # a sample can be trained on without what is measured
                continue
        return measures

    def __call__(self, sample: Sample, epoch: int) -> dict[str, list[View]]:
        """Raises `BadSample`; any other error of an augmentation is a `DataError` that names the sample."""
        key = sample["__key__"]
        views = {}
        for name, augmentation in self.augment.items():
            rng = np.random.default_rng(number(self.seed, epoch, key, name))
            try:
                views[name] = augmentation.views(sample, rng)
            except BadSample:
                raise
            except Exception as error:
                raise DataError(
                    f"{sample.get('__url__')}: sample {key!r}: augment.{name} ({augmentation.name}) failed: "
                    f"{type(error).__name__}: {error}"
                ) from error
        return views


class ShardStream(IterableDataset[Item | Failure]):
    """Endless passes over `shards`; within a pass (epoch) each sample comes once.

    Shards are shuffled by (seed, epoch) and dealt to the streams of all ranks and workers; where there are fewer
    shards than streams, each stream reads them all and keeps its share of the samples. The shuffle buffer is drained
    at the end of a pass.
    """

    def __init__(
        self,
        shards: Sequence[str],
        views: SampleViews,
        *,
        seed: int,
        shuffle: int,
        rank: int = 0,
        world: int = 1,
        reading: Callable[[str], None] | None = None,
    ) -> None:
        """`reading` is called with the name of each shard that is opened."""
        super().__init__()
        self.reading = reading
        self.shards = list(shards)
        self.views = views
        self.seed = seed
        self.shuffle = max(shuffle, 1)
        self.rank, self.world = rank, world
        self.epoch = 0
        self.position = 0  # in this epoch's list of shards
        self.offset = 0  # samples already read of that shard
        self.before = 0  # samples of the shards before it
        self.drawn = 0  # picks from the buffer so far in this epoch
        self.waiting: list[tuple[int, int]] = []  # (shard, offset) of each sample in the buffer
        self.bad_in_a_row = 0

    def state_dict(self) -> dict[str, Any]:
        """Plain integers."""
        return {
            "epoch": self.epoch,
            "position": self.position,
            "offset": self.offset,
            "before": self.before,
            "drawn": self.drawn,
            "waiting": [value for pair in self.waiting for value in pair],
            "bad_in_a_row": self.bad_in_a_row,
            "shards": len(self.shards),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises `DataError` when the data has changed under the run."""
        if state["shards"] != len(self.shards):
            raise DataError(
                f"the run was started on {state['shards']} shards and data.source now names {len(self.shards)}; "
                "an exact resume needs the same shards"
            )
        self.epoch, self.position, self.offset = state["epoch"], state["position"], state["offset"]
        self.before, self.drawn, self.bad_in_a_row = state["before"], state["drawn"], state["bad_in_a_row"]
        flat = state["waiting"]
        self.waiting = list(zip(flat[::2], flat[1::2], strict=True))

    def __iter__(self) -> Iterator[Item | Failure]:
        try:
            yield from self._items()
        except DataError as error:
            yield Failure(str(error))

    def _stream(self) -> tuple[int, int]:
        """(number of this stream, number of streams) over all ranks and workers."""
        worker = get_worker_info()
        workers = worker.num_workers if worker is not None else 1
        return self.rank * workers + (worker.id if worker is not None else 0), self.world * workers

    def _deal(self) -> tuple[list[int], int, int]:
        """This epoch's shards of this stream, and (share, shares) of their samples to keep."""
        mine, streams = self._stream()
        order = [
            int(i) for i in np.random.default_rng(number(self.seed, "shards", self.epoch)).permutation(len(self.shards))
        ]
        if len(order) >= streams:
            return order[mine::streams], 0, 1
        return order, mine, streams

    def _items(self) -> Iterator[Item | Failure]:
        buffer = self._restore()
        skipped: list[Skipped] = []
        mine, streams = self._stream()
        while True:
            for shard, offset, sample in self._pass(skipped):
                buffer.append((shard, offset, sample))
                self.waiting.append((shard, offset))
                if len(buffer) >= self.shuffle:
                    yield from self._use(buffer, skipped, mine)
            while buffer:
                yield from self._use(buffer, skipped, mine)
            if self.drawn == 0:
                raise DataError(
                    f"the shards hold fewer samples than there are loader workers over all ranks ({streams}): lower "
                    f"data.workers; the shards: {', '.join(self.shards[:3])}"
                )
            # one of several streams may be dealt only bad shards for a pass or two
            if self.bad_in_a_row >= (self.drawn if streams == 1 else max(self.drawn, MANY)):
                raise DataError(
                    f"no sample can be used: the last {self.bad_in_a_row} were all skipped, the last one "
                    f"{skipped[-1].url}: {skipped[-1].key!r}: {skipped[-1].reason}"
                )
            self.epoch, self.position, self.offset, self.before, self.drawn = self.epoch + 1, 0, 0, 0, 0

    def _use(
        self, buffer: list[tuple[int, int, Sample]], skipped: list[Skipped], mine: int
    ) -> Iterator[Item | Failure]:
        """Take one sample out of the buffer and yield its views, unless it is bad."""
        pick = number(self.seed, self.epoch, mine, self.drawn) % len(buffer)
        self.drawn += 1
        buffer[pick], buffer[-1] = buffer[-1], buffer[pick]
        self.waiting[pick], self.waiting[-1] = self.waiting[-1], self.waiting[pick]
        _, _, sample = buffer.pop()
        self.waiting.pop()
        try:
            views = self.views(sample, self.epoch)
        except BadSample as error:
            self.bad_in_a_row += 1
            skipped.append(Skipped(sample["__key__"], str(sample["__url__"]), str(error)))
            return
        self.bad_in_a_row = 0
        item = Item(sample["__key__"], views, number(self.seed, self.epoch, sample["__key__"]), list(skipped))
        item.measures = self.views.measure(sample)
        skipped.clear()
        yield item

    def _pass(self, skipped: list[Skipped]) -> Iterator[tuple[int, int, Sample]]:
        """The rest of this epoch's samples of this stream, in the shards' order."""
        shards, share, shares = self._deal()
        while self.position < len(shards):
            shard = shards[self.position]
            start = self.offset
            count = 0
            try:
                for offset, sample in enumerate(self._read(shard)):
                    count = offset + 1
                    if offset < start:
                        continue
                    self.offset = offset + 1
                    # counted on from shard to shard, or shards of few samples would leave the last streams none
                    if (self.before + offset) % shares == share:
                        yield shard, offset, sample
            except DataError as error:
                if count == 0:
                    raise
                skipped.append(Skipped("(rest of the shard)", self.shards[shard], str(error)))
            if count == 0:
                raise DataError(f"{self.shards[shard]}: the shard is empty. Write it again, or leave it out.")
            self.position, self.offset, self.before = self.position + 1, 0, self.before + count

    def _read(self, shard: int) -> Iterator[Sample]:
        if self.reading is not None:
            self.reading(self.shards[shard])
        return read_shard(self.shards[shard])

    def _restore(self) -> list[tuple[int, int, Sample]]:
        """Read the buffered samples again, by their references."""
        wanted: dict[int, set[int]] = {}
        for shard, offset in self.waiting:
            wanted.setdefault(shard, set()).add(offset)
        found: dict[tuple[int, int], Sample] = {}
        for shard, offsets in wanted.items():
            last = max(offsets)
            for offset, sample in enumerate(self._read(shard)):
                if offset in offsets:
                    found[shard, offset] = sample
                if offset >= last:
                    break
        lost = [reference for reference in self.waiting if reference not in found]
        if lost:
            raise DataError(f"{self.shards[lost[0][0]]}: has fewer samples than when the run was saved; it has changed")
        return [(shard, offset, found[shard, offset]) for shard, offset in self.waiting]
