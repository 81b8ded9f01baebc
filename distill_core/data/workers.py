"""The processes that make batches: how they start, what they wait for, and how they end.

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
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset, get_worker_info

from distill_core.batch import Batch
from distill_core.data.batches import LESS_SHARED, Failure, shared_memory
from distill_core.errors import DataError
from distill_core.system.process import end_with_parent

SECONDS_TO_WRITE = 0.5
"""For the workers, their stacks."""
SECONDS_TO_END = 5.0
"""For the workers, before they are killed."""
STACKS = signal.SIGUSR1
"""A worker that gets it writes down its stack."""
_NAME = 1024  # bytes


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


class Workers:
    """Worker processes of one data set, in turns: `take` from them, then `close`. With none the trainer reads."""

    def __init__(
        self, dataset: Dataset[Any], table: WorkerTable, count: int, *, prefetch: int, ahead: int, pin: bool
    ) -> None:
        """`ahead` batches are taken from the workers before they are asked for."""
        self.table = table
        self._start: _StartWorker | None = None
        if count:
            handle, name = tempfile.mkstemp(prefix="distill-stacks-")
            os.close(handle)
            self._start = _StartWorker(table, name)
        before = multiprocessing.active_children()
        batches = in_workers(dataset, count, self._start, prefetch=prefetch, pin=pin)
        self._processes = [child for child in multiprocessing.active_children() if child not in before]
        self._child_ended: Any = None
        if self._processes and threading.current_thread() is threading.main_thread():
            # torch's handler raises for a worker that died wherever the trainer is just then: in a save, in an update
            self._child_ended = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._reader = _Reader(batches, ahead)
        self._taken = 0  # batches

    def take(self, seconds: float) -> Batch | None:
        """The next batch, or None where there is none within `seconds`: ask again then.

        Raises `DataError` for what a worker met, and for a worker that died.
        """
        try:
            batch = self._reader.take(seconds)
        except RuntimeError as error:
            if problem := self._lost():
                raise DataError(problem) from error
            raise
        if isinstance(batch, Failure):
            raise DataError(batch.message)
        if batch is not None:
            self._taken += 1
        elif problem := self._lost():
            raise DataError(problem)
        return batch

    def waiting_for(self) -> str:
        """What the next batch waits for, as far as it can be known."""
        worker = self._taken % max(1, len(self._processes))  # batches are taken from the workers in turn
        who = self.table.name(worker) if self._processes else "the reader"
        shard = self.table.shard(worker)
        return f"{who} is reading {shard}" if shard is not None else f"{who} has opened no shard yet"

    def stacks(self) -> str:
        """What the next batch waits for, and the stacks of the workers' threads, for somebody to read."""
        if self._start is None:
            return ""
        started = set(self.table.pids)  # others would end of the signal
        for process in self._processes:
            if process.pid is not None and process.pid in started:
                with suppress(ProcessLookupError):
                    os.kill(process.pid, STACKS)
        time.sleep(SECONDS_TO_WRITE)
        path = Path(self._start.stacks)
        written = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        return f"\n{self.waiting_for()}; the data workers:\n\n{written}"

    def _lost(self) -> str | None:
        """What became of a worker that is no longer there, and what to do."""
        for process in self._processes:
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
        self._reader.close()
        if self._start is not None:
            self._start.end()
        end = time.monotonic() + SECONDS_TO_END
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join(max(0.0, end - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
        if self._start is not None:
            Path(self._start.stacks).unlink(missing_ok=True)
        if self._child_ended is not None:
            signal.signal(signal.SIGCHLD, self._child_ended)


def in_workers(
    dataset: Dataset[Any],
    workers: int,
    start_worker: Callable[[int], None] | None,
    *,
    prefetch: int,
    pin: bool = False,
) -> Iterator[Any]:
    """What the dataset gives, made by workers that start now."""
    with warnings.catch_warnings():
        # more workers than cores: the trainer says it, in a recipe's terms
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        return iter(
            DataLoader(
                dataset,
                batch_size=None,
                num_workers=workers,
                prefetch_factor=prefetch if workers else None,
                pin_memory=pin,
                worker_init_fn=start_worker,
            )
        )


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
