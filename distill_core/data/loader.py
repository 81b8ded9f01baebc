"""The training loader: endless batches in a fixed order, and the position in it that a checkpoint holds."""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from torch.utils.data import Dataset, IterableDataset, get_worker_info

from distill_core.batch import Batch
from distill_core.data.batches import BatchReader, Collate, Failure, SampleViews, Visits
from distill_core.data.fields import SampleFields
from distill_core.data.lengths import Lengths
from distill_core.data.order import Order, ShuffledOrder, WeightedOrder, stable_hash
from distill_core.data.shard import Patience, Shard
from distill_core.data.workers import Workers, WorkerTable, in_workers
from distill_core.errors import DataError
from distill_core.recipe.sections import Recipe
from distill_core.system.process import end_with_parent
from distill_core.teachers.cached import of_run

JUDGED = 1000
"""By fewer samples no share of bad ones is judged."""
LOOK_AHEAD = 2
"""Batches that a rank holds beside the one that it hands out, so that ranks need not ask one another at each step."""


@dataclass(slots=True)
class _Arrived:
    """A batch that `wait` hands out next, with the samples judged by then; or the error that it raises."""

    batch: Batch | None
    good: int
    bad: int
    error: Exception | None = None


class _Batches(IterableDataset[Batch | Failure]):
    """The batches of one rank from a position on: each worker makes every `workers`-th of them."""

    def __init__(self, reader: BatchReader, start: int, batch_size: int, rank: int, world: int) -> None:
        """`batch_size` is that of all ranks, of which each takes an equal part."""
        super().__init__()
        self.reader, self.start, self.batch_size = reader, start, batch_size
        self.part = batch_size // world
        self.offset = rank * self.part

    def __iter__(self) -> Iterator[Batch | Failure]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        for batch in count(number, workers):
            first = self.start + batch * self.batch_size + self.offset
            yield self.reader.batch(range(first, first + self.part))


class _Ranges(Dataset[Visits | Failure]):
    """A batch of each of some ranges of positions."""

    def __init__(self, reader: BatchReader, ranges: Sequence[range]) -> None:
        self.reader, self.ranges = reader, ranges
        self.trainer = os.getpid()

    def __len__(self) -> int:
        return len(self.ranges)

    def __getitem__(self, number: int) -> Visits | Failure:
        return self.reader.visits(self.ranges[number])

    def start_worker(self, worker: int) -> None:
        """In each worker, which ends with the process that reads."""
        end_with_parent(self.trainer, signal.SIGKILL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)


class Loader:
    """Endless batches: `start`, `wait` for each, `close`.

    Its state is the position in the order after the last batch that was handed out, whatever is prefetched: the same on
    all ranks, and for any number of them and of workers.
    """

    def __init__(
        self,
        recipe: Recipe,
        shards: Sequence[Shard],
        lengths: Lengths,
        sets: Sequence[str] = (),
        *,
        rank: int = 0,
        world: int = 1,
        pin: bool = False,
    ) -> None:
        """`sets` names the set of each shard; without it all are of one."""
        self.recipe, self.shards, self.lengths = recipe, list(shards), lengths
        self.sets = list(sets) or ["data"] * len(self.shards)
        _check_weights(recipe.data.weights, self.sets)
        self.rank, self.world, self.pin = rank, world, pin
        self.batch_size = recipe.data.batch_size * world
        """Samples of a step over all ranks; fixed when a run begins."""
        self.position = 0
        self._order = self._make_order()
        self.good, self.bad = 0, 0  # samples, as judged by `data.max_bad_fraction`
        self._workers: Workers | None = None
        self._arrived: deque[_Arrived] = deque()  # and not handed out

    @property
    def samples(self) -> int:
        """Of a pass over the data; with weights as many as the sets hold together."""
        return self._order.samples

    def start(self) -> None:
        """Start the workers."""
        table = WorkerTable(self.recipe.data.workers)
        batches = _Batches(self._batch_reader(table), self.position, self.batch_size, self.rank, self.world)
        ahead = 1 if self.world == 1 else 1 + LOOK_AHEAD
        data = self.recipe.data
        self._workers = Workers(batches, table, data.workers, prefetch=data.prefetch, ahead=ahead, pin=self.pin)

    def visits(self, ranges: Sequence[range]) -> Iterator[Visits]:
        """A batch of each range of positions, in this order, by workers of its own. Raises `DataError`."""
        data = self.recipe.data
        ranged = _Ranges(self._batch_reader(WorkerTable(data.workers)), ranges)
        for visits in in_workers(ranged, data.workers, ranged.start_worker, prefetch=data.prefetch):
            if isinstance(visits, Failure):
                raise DataError(visits.message)
            yield visits

    def _batch_reader(self, table: WorkerTable) -> BatchReader:
        recipe = self.recipe
        augment, joint = recipe.build_augmentations()
        collators = recipe.collators()
        fields = SampleFields(recipe.data.fields, recipe.data.optional)
        readers = {
            name: of_run(node).cls.reader(node.config, name, recipe.plan.teachers[name], collators)
            # what is cached comes last: it is of the samples that the others can read
            for name, node in sorted(recipe.all_teachers.items(), key=lambda x: x[1].config.cache is not None)
        }
        teachers = {name: reader for name, reader in readers.items() if reader is not None}
        return BatchReader(
            self.shards,
            self.lengths.samples,
            self._order,
            SampleViews(augment, recipe.seed, recipe.data.optional, joint),
            Collate(
                collators,
                recipe.data.optional,
                fields,
                {name: reader.collators for name, reader in teachers.items()},
                recipe.maskers(),
            ),
            patience=patience_of(recipe),
            sets=self.sets,
            reading=table,
            fields=fields,
            teachers=teachers,
        )

    def _make_order(self) -> Order:
        seed, data = self.recipe.seed, self.recipe.data

        def shuffled(shards: Sequence[int]) -> Order:
            lengths = [self.lengths.samples[shard] for shard in shards]
            return ShuffledOrder(lengths, seed=seed, streams=data.streams, shuffle=data.shuffle)

        if data.weights is None and data.batches == "mixed":
            return shuffled(range(len(self.shards)))
        members = {name: [i for i, own in enumerate(self.sets) if own == name] for name in dict.fromkeys(self.sets)}
        orders = {name: shuffled(shards) for name, shards in members.items()}
        weights = data.weights or {name: float(order.samples) for name, order in orders.items()}
        names = [name for name, weight in weights.items() if weight > 0]
        return WeightedOrder(
            [members[name] for name in names],
            [orders[name] for name in names],
            [weights[name] for name in names],
            seed=seed,
            run=self.batch_size if data.batches == "one_set" else 1,
        )

    def wait(self, seconds: float) -> Batch | None:
        """The next batch, or None where there is none within `seconds`: ask again then.

        Raises `DataError` for what a worker met, for a worker that died, and for too many bad samples.
        """
        if not self._arrived and not self._receive(seconds):
            return None
        following = self._arrived.popleft()
        if following.batch is None:
            assert following.error is not None
            raise following.error
        self.good, self.bad = following.good, following.bad
        self.position += self.batch_size
        return following.batch

    def holds(self, count: int) -> bool:
        """Whether `wait` will hand out the next `count` batches (up to LOOK_AHEAD) at once, and without an error."""
        while len(self._arrived) < count and (not self._arrived or self._arrived[-1].error is None):
            if not self._receive(0.0):
                return False
        return len(self._arrived) >= count and all(following.error is None for following in self._arrived)

    def _receive(self, seconds: float) -> bool:
        """Take one more batch, or an error in its place, into `_arrived`; False where none comes within `seconds`."""
        last = self._arrived[-1] if self._arrived else _Arrived(None, self.good, self.bad)
        try:
            assert self._workers is not None, "not started"
            batch = self._workers.take(seconds)
            if batch is None:
                return False
            self._arrived.append(_Arrived(batch, *self._judge(batch, last.good, last.bad)))
        except Exception as error:
            self._arrived.append(_Arrived(None, last.good, last.bad, error))
        return True

    def _judge(self, batch: Batch, good: int, bad: int) -> tuple[int, int]:
        """The good and the bad samples, this batch's included. Raises `DataError` where more of this pass are bad than
        the recipe allows."""
        start = self.position + len(self._arrived) * self.batch_size
        this_pass, next_pass = (position // self.samples for position in (start, start + self.batch_size))
        good += len(batch) - len(batch.skipped)
        bad += len(batch.skipped)
        total, allowed = good + bad, self.recipe.data.max_bad_fraction
        if total < JUDGED and allowed > 0:
            return good, bad
        if bad > allowed * total:
            raise DataError(
                f"too many samples cannot be used: {bad} of the last {total}, where data.max_bad_fraction "
                f"({allowed:g}) allows {int(allowed * total)}; the last: {batch.skipped[-1] if batch.skipped else '-'}"
            )
        return (0, 0) if this_pass < next_pass else (good, bad)

    def waiting_for(self) -> str:
        """What the next batch waits for, as far as it can be known."""
        return self._workers.waiting_for() if self._workers is not None else "not started"

    def stacks(self) -> str:
        """What the next batch waits for, and the stacks of the workers' threads, for somebody to read."""
        return self._workers.stacks() if self._workers is not None else ""

    def close(self) -> None:
        """End the workers, whatever they wait for."""
        if self._workers is not None:
            self._workers.close()
            self._workers = None

    def __iter__(self) -> Iterator[Batch]:
        """Batches without end, from workers that start at once."""
        self.start()
        return self._forever()

    def _forever(self) -> Iterator[Batch]:
        try:
            while True:
                if (batch := self.wait(1.0)) is not None:
                    yield batch
        finally:
            self.close()

    def under(self, recipe: Recipe) -> Loader:
        """A loader that continues at this one's place with the views of another recipe; this one is closed."""
        loader = Loader(recipe, self.shards, self.lengths, self.sets, rank=self.rank, world=self.world, pin=self.pin)
        loader.load_state_dict(self.state_dict())
        started = self._workers is not None
        self.close()
        if started:
            loader.start()
        return loader

    def state_dict(self) -> dict[str, Any]:
        """Plain data, as of the last batch that was handed out. Not while a batch is waited for."""
        return {
            "position": self.position,
            "batch_size": self.batch_size,
            "lengths": list(self.lengths.samples),
            "assumed": sorted(self.lengths.unopened),
            "names": digest([shard.name for shard in self.shards]),
            "good": self.good,
            "bad": self.bad,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Before `start`. Raises `DataError` for other shards than the run was started on, and where the ranks cannot
        share a batch."""
        self._check_names(state)
        lengths, unopened = list(state["lengths"]), dict(self.lengths.unopened)
        for i, (then, now) in enumerate(zip(lengths, self.lengths.samples, strict=True)):
            if i not in unopened and i not in state["assumed"] and then != now:
                raise DataError(
                    f"{self.shards[i].name}: has {now} samples, and had {then} when the run began; an exact resume "
                    "needs the same data"
                )
        if state["batch_size"] % self.world:
            raise DataError(
                f"the run's batches of {state['batch_size']} samples cannot be shared by {self.world} ranks: resume it "
                "with a number of ranks that divides them"
            )
        self.lengths = Lengths(lengths, unopened | dict.fromkeys(state["assumed"], ""))
        self.batch_size, self.position = state["batch_size"], state["position"]
        self._order = self._make_order()
        self.good, self.bad = state["good"], state["bad"]

    def _check_names(self, state: Mapping[str, Any]) -> None:
        if len(state["lengths"]) != len(self.shards):
            raise DataError(
                f"the run was started on {len(state['lengths'])} shards and data.source now names {len(self.shards)} "
                "(a wildcard names those that are there); an exact resume needs the same shards"
            )
        if state["names"] != digest([shard.name for shard in self.shards]):
            raise DataError(
                f"data.source names other shards than the run was started on, or in another order (now "
                f"{self.shards[0].name}, ...); an exact resume needs the same, though their folder may have moved"
            )


def _check_weights(weights: Mapping[str, float] | None, sets: Sequence[str]) -> None:
    """Raises `DataError`."""
    if weights is not None and set(weights) != set(sets):
        raise DataError(
            f"data.weights names {', '.join(weights)}, and data.source has the sets {', '.join(dict.fromkeys(sets))}: "
            "give a weight to each (0 leaves it out)"
        )


def patience_of(recipe: Recipe) -> Patience:
    """That of the recipe's options."""
    return Patience(recipe.data.retries, recipe.data.timeout, recipe.data.shard_cache)


def digest(names: Sequence[str]) -> int:
    """Of the shards' names in order, without the folder (or the URL) that they have in common, which may move."""
    first, last = min(names), max(names)
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    start = first.rfind("/", 0, same) + 1
    return stable_hash(*(name[start:] for name in names))
