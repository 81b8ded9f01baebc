"""An endless, shuffled stream of samples over shards whose exact state is a few integers.

The state of one stream (one loader worker of one rank) is the epoch, the shard, the offset in it, and *references* to
the samples in the shuffle buffer, never their bytes. A sample's views depend on (seed, epoch, sample key) alone.
"""

from __future__ import annotations

import hashlib
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from distill_core.batch import REST_OF_SHARD, WHOLE_SHARD, Sample, Skipped, View
from distill_core.data.shards import PATIENCE, Patience, Unusable, read_shard
from distill_core.errors import BadSample, DataError
from distill_core.interfaces import Augmentation


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
"""Give up after this many unusable samples in a row; and by fewer samples no share of bad ones is judged."""
SHARDS = 10
"""By fewer shards no share of bad samples is judged."""
DOWN = 5
"""Give up after this many different shards in a row that cannot be read (or all, where there are fewer)."""


def stable_hash(*parts: Any) -> int:
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

    def __call__(self, sample: Sample, epoch: int, repeat: int = 0) -> dict[str, list[View]]:
        """`repeat` numbers the places of a shard that is listed more than once: each has views of its own.

        Raises `BadSample` for what an augmentation says it cannot use. Any other error of an augmentation is a bug, not
        the sample's fault: a `DataError` that names the sample.
        """
        key = sample["__key__"]
        views = {}
        for name, augmentation in self.augment.items():
            rng = np.random.default_rng(stable_hash(self.seed, epoch, key, name, *_repetition(repeat)))
            try:
                views[name] = augmentation.train_views(sample, rng)
            except BadSample:
                raise
            except Exception as error:
                raise DataError(
                    f"{sample.get('__url__')}: sample {key!r}: augment.{name} ({augmentation.name}) failed: "
                    f"{type(error).__name__}: {error}. An augmentation raises BadSample for a sample that is to be "
                    "skipped; this is a bug of it."
                ) from error
        return views


def _repetition(repeat: int) -> tuple[int, ...]:
    """What enters a seed: nothing for the first place of a shard, whose views are those of a shard listed once."""
    return (repeat,) if repeat else ()


def digest(shards: Sequence[str]) -> int:
    """Of the shards' names in order, without the folder (or the URL) that they have in common, which may move."""
    first, last = min(shards), max(shards)
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    start = first.rfind("/", 0, same) + 1
    return stable_hash(*(shard[start:] for shard in shards))


def unseen(shards: int, streams: int) -> float:
    """Share of the samples that were not seen once as many as all have been, where all shards are of one size.

    All streams go on at one pace, so those that were dealt one shard more than others are not at their end then. The
    others have begun their next pass, on shards drawn anew.
    """
    each, more = divmod(shards, streams)
    if each == 0:  # all streams read all shards, and share their samples evenly
        return 0.0
    left = more * (each + 1 - shards / streams) / shards
    return left * (1 - left)


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
        patience: Patience = PATIENCE,
        max_bad_fraction: float = 0.1,
    ) -> None:
        """`reading` is called with the name of each shard that is opened."""
        super().__init__()
        self.reading = reading
        self.shards = list(shards)
        listed: Counter[str] = Counter()
        self.repeats: list[int] = []  # how often each of them stands before its place in the list
        for shard in self.shards:
            self.repeats.append(listed[shard])
            listed[shard] += 1
        self.views = views
        self.seed = seed
        self.shuffle = max(shuffle, 1)
        self.rank, self.world = rank, world
        self.patience, self.max_bad_fraction = patience, max_bad_fraction
        self.sizes: dict[int, int] = {}  # samples of the shards that were read whole
        self.epoch = 0
        self.position = 0  # in this epoch's list of shards
        self.offset = 0  # samples already read of that shard
        self.before = 0  # samples of the shards before it
        self.drawn = 0  # picks from the buffer so far in this epoch
        self.waiting: list[tuple[int, int]] = []  # (shard, offset) of each sample in the buffer
        self.bad_in_a_row = 0
        self.good, self.bad = 0, 0  # samples, as judged by `max_bad_fraction`
        self.passes = 0  # complete ones that they come from
        self.failed = 0  # shards of this epoch that could not be read
        self.down: list[int] = []  # shards that could not be read since one could
        self.changed: str | None = None  # what makes a resume impossible

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
            "good": self.good,
            "bad": self.bad,
            "passes": self.passes,
            "failed": self.failed,
            "down": list(self.down),
            "shards": len(self.shards),
            "names": digest(self.shards),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Where the shards are others than the run was started on, the stream holds a `Failure` alone.

        Raised here, it would leave a worker process as a traceback.
        """
        state = {**self.state_dict(), **state}  # an older checkpoint has fewer counts
        if state["shards"] != len(self.shards):
            self.changed = (
                f"the run was started on {state['shards']} shards and data.source now names {len(self.shards)} (a "
                "wildcard names those that are there); an exact resume needs the same shards"
            )
        elif state["names"] != digest(self.shards):
            self.changed = (
                f"data.source names other shards than the run was started on, or in another order (now "
                f"{self.shards[0]}, ...); an exact resume needs the same, though their folder may have moved"
            )
        self.epoch, self.position, self.offset = state["epoch"], state["position"], state["offset"]
        self.before, self.drawn, self.bad_in_a_row = state["before"], state["drawn"], state["bad_in_a_row"]
        self.good, self.bad, self.passes = state["good"], state["bad"], state["passes"]
        self.failed, self.down = state["failed"], list(state["down"])
        flat = state["waiting"]
        self.waiting = list(zip(flat[::2], flat[1::2], strict=True))

    def __iter__(self) -> Iterator[Item | Failure]:
        if self.changed is not None:
            yield Failure(self.changed)
            return
        try:
            yield from self._items()
        except DataError as error:
            yield Failure(str(error))

    def _stream(self) -> tuple[int, int]:
        """(number of this stream, number of streams) over all ranks and workers."""
        worker = get_worker_info()
        workers = worker.num_workers if worker is not None else 1
        return self.rank * workers + (worker.id if worker is not None else 0), self.world * workers

    def _shares(self) -> int:
        """Among how many streams a shard's samples are shared out."""
        _, streams = self._stream()
        return streams if len(self.shards) < streams else 1

    def _deal(self) -> tuple[list[int], int, int]:
        """This epoch's shards of this stream, and (share, shares) of their samples to keep."""
        mine, streams = self._stream()
        order = [
            int(i)
            for i in np.random.default_rng(stable_hash(self.seed, "shards", self.epoch)).permutation(len(self.shards))
        ]
        if self._shares() == 1:
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
            # a stream whose shards cannot be read now is dealt others in the next pass
            if self.drawn == 0 and (not self.failed or self._shares() > 1):
                raise DataError(
                    f"the shards hold fewer samples than there are loader workers over all ranks ({streams}): lower "
                    f"data.workers; the shards: {', '.join(self.shards[:3])}"
                )
            # one of several streams may be dealt only bad shards for a pass or two
            if self.drawn and self.bad_in_a_row >= (
                self.drawn if streams == 1 and not self.failed else max(self.drawn, MANY)
            ):
                raise DataError(
                    f"no sample can be used: the last {self.bad_in_a_row} were all skipped, the last one "
                    f"{skipped[-1].url}: {skipped[-1].key!r}: {skipped[-1].reason}"
                )
            self.epoch, self.position, self.offset, self.before, self.drawn = self.epoch + 1, 0, 0, 0, 0
            self.failed = 0
            self.passes += 1
            if self.good + self.bad >= self._fewest():
                self.good, self.bad, self.passes = 0, 0, 0

    def _use(
        self, buffer: list[tuple[int, int, Sample]], skipped: list[Skipped], mine: int
    ) -> Iterator[Item | Failure]:
        """Take one sample out of the buffer and yield its views, unless it is bad."""
        pick = stable_hash(self.seed, self.epoch, mine, self.drawn) % len(buffer)
        self.drawn += 1
        buffer[pick], buffer[-1] = buffer[-1], buffer[pick]
        self.waiting[pick], self.waiting[-1] = self.waiting[-1], self.waiting[pick]
        shard, _, sample = buffer.pop()
        self.waiting.pop()
        key, repeat = sample["__key__"], self.repeats[shard]
        try:
            views = self.views(sample, self.epoch, repeat)
        except BadSample as error:
            self.bad_in_a_row += 1
            skipped.append(Skipped(key, str(sample["__url__"]), str(error)))
            self._count_bad(1, skipped[-1])
            return
        self.bad_in_a_row = 0
        self.good += 1
        item = Item(key, views, stable_hash(self.seed, self.epoch, key, *_repetition(repeat)), list(skipped))
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
                self.sizes[shard] = count
            except DataError as error:
                self._skip_rest(shard, max(count, start), str(error), skipped)
            if count:
                self.down = []
            # other streams may have read a shard whole that failed here
            self.before += max(count, self.sizes.get(shard, 0))
            self.position, self.offset = self.position + 1, 0

    def _skip_rest(self, shard: int, count: int, reason: str, skipped: list[Skipped]) -> None:
        """Note the loss of a shard after `count` samples; raises `DataError` where there are too many."""
        skipped.append(Skipped(REST_OF_SHARD if count else WHOLE_SHARD, self.shards[shard], reason))
        self.failed += 1
        if not count and shard not in self.down:
            self.down.append(shard)
        if len(self.down) >= min(len(self.shards), DOWN):
            raise DataError(f"no shard can be read: the last {len(self.down)} failed, the last one {reason}")
        expected = self.sizes.get(shard, self._largest())
        self._count_bad(max((expected - count) // self._shares(), 1), skipped[-1])

    def _largest(self) -> int:
        return max(self.sizes.values(), default=0)

    def _fewest(self) -> int:
        """Samples by which a share of bad ones can be judged."""
        return max(MANY, SHARDS * self._largest() // self._shares())

    def _count_bad(self, samples: int, last: Skipped) -> None:
        """Raises `DataError` past the recipe's tolerance."""
        self.bad += samples
        _, streams = self._stream()
        whole_pass = len(self.shards) * self._largest() // streams
        tried = max(self.good + self.bad, (self.passes + 1) * whole_pass, self._fewest())
        if self.bad > self.max_bad_fraction * tried:
            raise DataError(
                f"too many samples cannot be used: {self.bad}, and {self.good} can, where data.max_bad_fraction "
                f"({self.max_bad_fraction:g}) allows {int(self.max_bad_fraction * tried)}; the last: {last}"
            )

    def _read(self, shard: int) -> Iterator[Sample]:
        if self.reading is not None:
            self.reading(self.shards[shard])
        return read_shard(self.shards[shard], self.patience)

    def _restore(self) -> list[tuple[int, int, Sample]]:
        """Read the buffered samples again, by their references; those of a shard that has gone are `Unusable`."""
        wanted: dict[int, set[int]] = {}
        for shard, offset in self.waiting:
            wanted.setdefault(shard, set()).add(offset)
        samples: dict[tuple[int, int], Sample] = {}
        for shard, offsets in wanted.items():
            url, last, reason = self.shards[shard], max(offsets), None
            try:
                for offset, sample in enumerate(self._read(shard)):
                    if offset in offsets:
                        samples[shard, offset] = sample
                    if offset >= last:
                        break
            except DataError as error:
                reason = str(error)
            for offset in offsets - {offset for of, offset in samples if of == shard}:
                if reason is None:
                    raise DataError(f"{url}: has fewer samples than when the run was saved; it has changed")
                samples[shard, offset] = Unusable(f"(sample {offset})", url, reason)
        return [(shard, offset, samples[shard, offset]) for shard, offset in self.waiting]
