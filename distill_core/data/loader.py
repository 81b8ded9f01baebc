"""The training loader: streams in worker processes, batches, exact state.

Nothing that a worker or a read waits for is waited for by the training thread: batches are taken in a thread beside
it, so that it can answer a signal, and say what is being waited for.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import queue
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from torch.utils.data import get_worker_info

from distill_core.batch import Batch, Skipped
from distill_core.data.shards import Patience
from distill_core.data.stream import Failure, Item, SampleViews, ShardStream
from distill_core.errors import DataError
from distill_core.interfaces import Collator
from distill_core.recipe.sections import Recipe
from distill_core.system.files import in_words
from distill_core.system.process import end_with_parent

SHARED_MEMORY = Path("/dev/shm")
SECONDS_TO_END = 5.0
"""For the workers, before they are killed."""


class Collate:
    """Items -> a batch, by each modality's collator. Picklable."""

    def __init__(self, collators: Mapping[str, Collator]) -> None:
        self.collators = dict(collators)

    def __call__(self, items: Sequence[Item | Failure]) -> Batch | Failure:
        """A failure in place of an item stands for the whole batch."""
        good: list[Item] = []
        skipped: list[Skipped] = []
        for item in items:
            if isinstance(item, Failure):
                return item
            good.append(item)
            skipped += item.skipped
        seeds = [item.seed for item in good]
        try:
            views = {
                name: collate([item.views[name] for item in good], seeds) for name, collate in self.collators.items()
            }
        except Exception as error:
            keys = ", ".join(item.key for item in good[:3])
            return Failure(f"a batch (samples {keys}, ...) cannot be collated: {type(error).__name__}: {error}")
        measures = [item.measures for item in good if item.measures]
        batch = Batch(views, [item.key for item in good], skipped, measures)
        if get_worker_info() is not None:
            try:
                batch.share_memory()
            except RuntimeError as error:
                # the queue's own thread would print it and drop the batch, and the trainer wait for it for ever
                return Failure(f"a batch does not fit into {_shared_memory()}: {error}. {_LESS_SHARED}")
        return batch


_LESS_SHARED = "Lower data.workers, data.prefetch or data.batch_size, or give more (docker run --shm-size=16g)."


def _shared_memory() -> str:
    if not SHARED_MEMORY.is_dir():
        return "shared memory"
    usage = shutil.disk_usage(SHARED_MEMORY)
    return f"shared memory ({SHARED_MEMORY}: {in_words(usage.free)} of {in_words(usage.total)} free)"


@contextmanager
def _without_torchs_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        # torchdata still calls torch.set_vital, which torch has deprecated: nothing a user could act on
        warnings.filterwarnings("ignore", message="'set_vital' is deprecated")
        # more workers than cores: the trainer says it, in a recipe's terms
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        yield


_NAME = 1024  # bytes


class WorkerTable:
    """What each worker reads, in memory that the trainer shares with its workers."""

    def __init__(self, workers: int) -> None:
        self._pids = multiprocessing.RawArray("q", max(workers, 1))
        self._shards = [multiprocessing.RawArray("c", _NAME) for _ in range(max(workers, 1))]

    def __call__(self, shard: str) -> None:
        """In a worker, or where there is none in the trainer: it opens this shard."""
        worker = get_worker_info()
        self._shards[worker.id if worker is not None else 0].value = shard.encode()[: _NAME - 1]

    def register(self, worker: int) -> None:
        """In a worker, when it starts."""
        self._pids[worker] = os.getpid()

    def name(self, worker: int) -> str:
        """`data worker 1 (pid 4711)`."""
        return f"data worker {worker} (pid {self._pids[worker]})"

    def name_of(self, pid: int | None) -> str:
        """As `name`; without a number for one that has not come so far as to register."""
        return next((self.name(i) for i, own in enumerate(self._pids) if own == pid), f"data worker (pid {pid})")

    def shard(self, worker: int) -> str | None:
        """The shard that it opened last; None before the first."""
        return bytes(self._shards[worker].value).decode(errors="replace") or None


class _StartWorker:
    """In each worker: Ctrl-C and a batch system's SIGTERM reach it too, but the trainer alone answers, and saves.

    A worker that died of one would take the trainer with it. When the trainer ends it ends its workers by SIGTERM,
    and so does Python itself.
    """

    def __init__(self, table: WorkerTable) -> None:
        self.table = table
        self.trainer = os.getpid()
        self.ending = multiprocessing.RawValue("b", 0)
        atexit.register(self.end)

    def __call__(self, worker: int) -> None:
        # the batches of a trainer that was killed are nobody's, and what they hold is freed at once
        end_with_parent(self.trainer, signal.SIGKILL)
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


class _Reader:
    """Takes from an iterator in a thread, one at a time, when asked: what blocks there blocks nobody else."""

    def __init__(self, batches: Iterator[Batch | Failure]) -> None:
        self._batches = batches
        self._requests: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[Batch | Failure | Exception] = queue.SimpleQueue()
        self._asked = False
        # a daemon: the process may end while a read is blocked
        threading.Thread(target=self._work, name="batches", daemon=True).start()

    def _work(self) -> None:
        while self._requests.get():
            try:
                self._answers.put(next(self._batches))
            except Exception as error:
                self._answers.put(error)

    def take(self, seconds: float) -> Batch | Failure | None:
        """The next one, or None where it takes longer: ask again then."""
        if not self._asked:
            self._asked = True
            self._requests.put(True)
        try:
            answer = self._answers.get(timeout=seconds)
        except queue.Empty:
            return None
        self._asked = False
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        """Let the thread end."""
        self._requests.put(False)


class Loader:
    """Endless batches: `start`, `wait` for each, `close`. The state is that after the last batch that was handed out,
    whatever is prefetched."""

    def __init__(
        self, recipe: Recipe, shards: Sequence[str], *, rank: int = 0, world: int = 1, pin: bool = False
    ) -> None:
        from torchdata.stateful_dataloader import StatefulDataLoader

        augment = {name: node.build() for name, node in recipe.augment.items()}
        collators = {name: node.cls.collator(node.config) for name, node in recipe.backbone.items()}
        workers = recipe.data.workers
        self.table = WorkerTable(workers)
        self._start_worker = _StartWorker(self.table) if workers else None
        stream = ShardStream(
            shards,
            SampleViews(augment, recipe.seed),
            seed=recipe.seed,
            shuffle=recipe.data.shuffle,
            rank=rank,
            world=world,
            reading=self.table,
            patience=Patience(recipe.data.retries, recipe.data.timeout),
            max_bad_fraction=recipe.data.max_bad_fraction,
        )
        self._workers: list[BaseProcess] = []
        self._reader: _Reader | None = None
        self._child_ended: Any = None
        with _without_torchs_warnings():
            self._loader = StatefulDataLoader(
                stream,
                batch_size=recipe.data.batch_size,
                num_workers=workers,
                collate_fn=Collate(collators),
                prefetch_factor=recipe.data.prefetch if workers else None,
                pin_memory=pin,
                worker_init_fn=self._start_worker,
            )

    def start(self) -> None:
        """Start the workers."""
        before = multiprocessing.active_children()
        with _without_torchs_warnings():
            batches = iter(self._loader)
        self._workers = [child for child in multiprocessing.active_children() if child not in before]
        if self._workers and threading.current_thread() is threading.main_thread():
            # torch's handler raises for a worker that died wherever the trainer is just then: in a save, in an update
            self._child_ended = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._reader = _Reader(batches)

    def wait(self, seconds: float) -> Batch | None:
        """The next batch, or None where there is none within `seconds`: ask again then.

        Raises `DataError` for what a worker met, and for a worker that died.
        """
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

    def waiting_for(self) -> str:
        """What the next batch waits for, as far as it can be known."""
        if not self._workers:
            who, worker = "the reader", 0
        else:
            # batches are taken from the workers in turn
            worker = (self._loader.state_dict()["_snapshot"]["_last_yielded_worker_id"] + 1) % len(self._workers)
            who = self.table.name(worker)
        shard = self.table.shard(worker)
        return f"{who} is reading {shard}" if shard is not None else f"{who} has opened no shard yet"

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
                return f"{who} died of SIGBUS: there is no room left in {_shared_memory()}. {_LESS_SHARED}"
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

    def state_dict(self) -> dict[str, Any]:
        """Plain data, as of the last batch that was handed out. Not while a batch is waited for."""
        state: dict[str, Any] = self._loader.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Before `start`."""
        self._loader.load_state_dict(state)
