"""The training loader: worker processes that make batches, and an exact state.

Nothing that a worker or a read waits for is waited for by the training thread: batches are taken in a thread beside
it, so that it can answer a signal, and say what is being waited for.
"""

from __future__ import annotations

import atexit
import faulthandler
import multiprocessing
import os
import queue
import signal
import tempfile
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from distill_core.batch import Batch
from distill_core.data.batches import LESS_SHARED, BatchReader, Collate, Failure, SampleViews, Visits, shared_memory
from distill_core.data.fields import SampleFields
from distill_core.data.lengths import Lengths
from distill_core.data.order import Order, ShuffledOrder, WeightedOrder, stable_hash
from distill_core.data.shard import Patience, Shard
from distill_core.errors import DataError
from distill_core.recipe.sections import Recipe
from distill_core.system.process import end_with_parent
from distill_core.teachers.cached import of_run

JUDGED = 1000
"""By fewer samples no share of bad ones is judged."""
SECONDS_TO_WRITE = 0.5
"""For the workers, their stacks."""
LOOK_AHEAD = 2
"""Batches that a rank holds beside the one that it hands out, so that ranks need not ask one another at each step."""
SECONDS_TO_END = 5.0
"""For the workers, before they are killed."""


_NAME = 1024  # bytes
STACKS = signal.SIGUSR1
"""A worker that gets it writes down its stack."""


class WorkerTable:
    """What each worker reads, in memory that the trainer shares with its workers."""

    def __init__(self, workers: int) -> None:
        self.pids = multiprocessing.RawArray("q", max(workers, 1))
        self._shards = [multiprocessing.RawArray("c", _NAME) for _ in range(max(workers, 1))]

    def __call__(self, shard: str) -> None:
        """In a worker, or where there is none in the trainer: it opens this shard."""
        worker = get_worker_info()
        self._shards[worker.id if worker is not None else 0].value = shard.encode()[: _NAME - 1]

    def register(self, worker: int) -> None:
        """In a worker, when it starts."""
        self.pids[worker] = os.getpid()

    def name(self, worker: int) -> str:
        """`data worker 1 (pid 4711)`."""
        return f"data worker {worker} (pid {self.pids[worker]})"

    def name_of(self, pid: int | None) -> str:
        """As `name`; without a number for one that has not come so far as to register."""
        return next((self.name(i) for i, own in enumerate(self.pids) if own == pid), f"data worker (pid {pid})")

    def shard(self, worker: int) -> str | None:
        """The shard that it opened last; None before the first."""
        return bytes(self._shards[worker].value).decode(errors="replace") or None


class _StartWorker:
    """In each worker: Ctrl-C and a batch system's SIGTERM reach it too, but the trainer alone answers, and saves.

    A worker that died of one would take the trainer with it. When the trainer ends it ends its workers by SIGTERM,
    and so does Python itself.
    """

    def __init__(self, table: WorkerTable, stacks: str) -> None:
        self.table, self.stacks = table, stacks
        self.trainer = os.getpid()
        self.ending = multiprocessing.RawValue("b", 0)
        atexit.register(self.end)

    def __call__(self, worker: int) -> None:
        # the batches of a trainer that was killed are nobody's, and what they hold is freed at once
        end_with_parent(self.trainer, signal.SIGKILL)
        # open for good: the handler, which no lock and no library holds up, writes there
        self._file = open(self.stacks, "a")  # noqa: SIM115
        faulthandler.register(STACKS, file=self._file)
        self.table.register(worker)
        for name in ("SIGINT", "SIGHUP"):
            if (number := getattr(signal, name, None)) is not None:
                signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._terminated)

    def end(self) -> None:
        """From here on SIGTERM ends a worker."""
        self.ending.value = 1

    def _terminated(self, number: int, frame: object) -> None:
        if self.ending.value:
            os._exit(0)


@dataclass(slots=True)
class _Arrived:
    """A batch that `wait` hands out next, with the samples judged by then; or the error that it raises."""

    batch: Batch | None
    good: int
    bad: int
    error: Exception | None = None


class _Reader:
    """Takes from an iterator in a thread, `wanted` at a time, when asked: what blocks there blocks nobody else."""

    def __init__(self, batches: Iterator[Batch | Failure], wanted: int) -> None:
        self._batches = batches
        self._wanted = wanted
        self._closed = False
        self._requests: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[Batch | Failure | Exception] = queue.SimpleQueue()
        self._asked = 0
        # a daemon: the process may end while a read is blocked
        threading.Thread(target=self._work, name="batches", daemon=True).start()

    def _work(self) -> None:
        while self._requests.get() and not self._closed:
            try:
                self._answers.put(next(self._batches))
            except Exception as error:
                self._answers.put(error)

    def take(self, seconds: float) -> Batch | Failure | None:
        """The next one, or None where it takes longer: ask again then."""
        while self._asked < self._wanted:
            self._asked += 1
            self._requests.put(True)
        try:
            answer = self._answers.get(timeout=seconds)
        except queue.Empty:
            return None
        self._asked -= 1
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        """Let the thread end."""
        self._closed = True
        self._requests.put(False)


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
        self.table = WorkerTable(recipe.data.workers)
        self._start_worker: _StartWorker | None = None
        self._workers: list[BaseProcess] = []
        self._reader: _Reader | None = None
        self._handed_out = 0  # batches, since the start
        self._arrived: deque[_Arrived] = deque()  # and not handed out
        self._child_ended: Any = None

    @property
    def samples(self) -> int:
        """Of a pass over the data; with weights as many as the sets hold together."""
        return self._order.samples

    def start(self) -> None:
        """Start the workers."""
        workers = self.recipe.data.workers
        if workers:
            handle, name = tempfile.mkstemp(prefix="distill-stacks-")
            os.close(handle)
            self._start_worker = _StartWorker(self.table, name)
        batches = _Batches(self._batch_reader(), self.position, self.batch_size, self.rank, self.world)
        before = multiprocessing.active_children()
        iterator = self._in_workers(batches, self._start_worker, pin=self.pin)
        self._workers = [child for child in multiprocessing.active_children() if child not in before]
        if self._workers and threading.current_thread() is threading.main_thread():
            # torch's handler raises for a worker that died wherever the trainer is just then: in a save, in an update
            self._child_ended = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._reader = _Reader(iterator, 1 if self.world == 1 else 1 + LOOK_AHEAD)

    def visits(self, ranges: Sequence[range]) -> Iterator[Visits]:
        """A batch of each range of positions, in this order, by workers of its own. Raises `DataError`."""
        ranged = _Ranges(self._batch_reader(), ranges)
        for visits in self._in_workers(ranged, ranged.start_worker):
            if isinstance(visits, Failure):
                raise DataError(visits.message)
            yield visits

    def _in_workers(
        self, dataset: Dataset[Any], start_worker: Callable[[int], None] | None, *, pin: bool = False
    ) -> Iterator[Any]:
        """What the dataset gives, made by workers that start now."""
        workers = self.recipe.data.workers
        with warnings.catch_warnings():
            # more workers than cores: the trainer says it, in a recipe's terms
            warnings.filterwarnings("ignore", message="This DataLoader will create")
            return iter(
                DataLoader(
                    dataset,
                    batch_size=None,
                    num_workers=workers,
                    prefetch_factor=self.recipe.data.prefetch if workers else None,
                    pin_memory=pin,
                    worker_init_fn=start_worker,
                )
            )

    def described(self, of: Recipe) -> dict[str, Any]:
        """What the views at all positions depend on, under a recipe for the same data: plain data for `changes`."""
        recipe = of.to_dict()
        options = ("weights", "batches", "streams", "shuffle", "optional", "fields")
        data = {option: recipe["data"][option] for option in options}
        if data["batches"] == "one_set":
            data["samples_of_a_step"] = self.batch_size
        names, lengths = [shard.name for shard in self.shards], self.lengths.samples
        shards = {
            "count": len(names),
            "names": digest(names),
            "samples": sum(lengths),
            "lengths": stable_hash(*lengths),
        }
        return {"seed": recipe["seed"], "data": {**data, "shards": shards}, "augment": recipe["augment"]}

    def _batch_reader(self) -> BatchReader:
        recipe = self.recipe
        augment = {name: node.build() for name, node in recipe.augment.items()}
        collators = {name: node.cls.collator(node.config) for name, node in recipe.backbone.items()}
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
            SampleViews(augment, recipe.seed, recipe.data.optional),
            Collate(
                collators,
                recipe.data.optional,
                fields,
                {name: reader.collators for name, reader in teachers.items()},
                recipe.maskers(),
            ),
            patience=patience_of(recipe),
            sets=self.sets,
            reading=self.table,
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
        self._handed_out += 1
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
            batch = self._take(seconds)
            if batch is None:
                return False
            self._arrived.append(_Arrived(batch, *self._judge(batch, last.good, last.bad)))
        except Exception as error:
            self._arrived.append(_Arrived(None, last.good, last.bad, error))
        return True

    def _take(self, seconds: float) -> Batch | None:
        assert self._reader is not None, "not started"
        try:
            batch = self._reader.take(seconds)
        except RuntimeError as error:
            if problem := self._lost_worker():
                raise DataError(problem) from error
            raise
        if isinstance(batch, Failure):
            raise DataError(batch.message)
        if batch is None and (problem := self._lost_worker()):
            raise DataError(problem)
        return batch

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
        if not self._workers:
            who, worker = "the reader", 0
        else:
            # batches are taken from the workers in turn
            worker = (self._handed_out + len(self._arrived)) % len(self._workers)
            who = self.table.name(worker)
        shard = self.table.shard(worker)
        return f"{who} is reading {shard}" if shard is not None else f"{who} has opened no shard yet"

    def stacks(self) -> str:
        """What the next batch waits for, and the stacks of the workers' threads, for somebody to read."""
        if self._start_worker is None:
            return ""
        started = set(self.table.pids)  # others would end of the signal
        for worker in self._workers:
            if worker.pid is not None and worker.pid in started:
                with suppress(ProcessLookupError):
                    os.kill(worker.pid, STACKS)
        time.sleep(SECONDS_TO_WRITE)
        path = Path(self._start_worker.stacks)
        written = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        return f"\n{self.waiting_for()}; the data workers:\n\n{written}"

    def _lost_worker(self) -> str | None:
        """What became of a worker that is no longer there, and what to do."""
        for process in self._workers:
            code = process.exitcode
            if code is None:
                continue
            who = self.table.name_of(process.pid)
            if code == -signal.SIGKILL:
                return (
                    f"{who} was killed (SIGKILL), most likely because memory ran out. Lower data.workers, "
                    "data.prefetch or data.shuffle, or ask for more memory."
                )
            if code == -signal.SIGBUS:
                return f"{who} died of SIGBUS: there is no room left in {shared_memory()}. {LESS_SHARED}"
            if code < 0:
                return f"{who} died of {signal.Signals(-code).name}: a fault in a library that decodes or reads samples"
            return f"{who} ended by itself with exit code {code}"
        return None

    def close(self) -> None:
        """End the workers, whatever they wait for."""
        if self._reader is None:
            return
        self._reader.close()
        self._reader = None
        if self._start_worker is not None:
            self._start_worker.end()
        end = time.monotonic() + SECONDS_TO_END
        for process in self._workers:
            process.terminate()
        for process in self._workers:
            process.join(max(0.0, end - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
        self._workers = []
        if self._start_worker is not None:
            Path(self._start_worker.stacks).unlink(missing_ok=True)
        if self._child_ended is not None:
            signal.signal(signal.SIGCHLD, self._child_ended)
            self._child_ended = None

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
        started = self._reader is not None
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
        if "position" not in state:
            raise DataError("the checkpoint is of an older release, which kept another place in the data")
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
