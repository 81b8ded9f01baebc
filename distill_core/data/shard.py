"""What training data is made of: shards, whose samples are read by number."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from distill_core.batch import Sample
from distill_core.errors import BadSample, DataError

T = TypeVar("T")


@dataclass(frozen=True)
class Patience:
    """How long a shard is tried before it counts as unreadable, and how much room copies of shards may take; the
    options of `data` with these names."""

    retries: int = 3
    timeout: float = 60.0
    shard_cache: float = 50.0


PATIENCE = Patience()


BACK_OFF = 1.0
"""Seconds before the first retry of a shard; each further one waits four times as long, up to a minute."""


def wait_before_retry(failures: int) -> None:
    """After so many failures, the first of which is number 0."""
    time.sleep(min(BACK_OFF * 4**failures, 60))


_NUMPY_HEADER = Lock()
"""Shards are prepared in threads, and in CPython 3.11 `ast`, by which numpy reads a header, fails in two at once
(python/cpython#106905)."""


def load_index(content: Path | bytes) -> NDArray[np.int64] | None:
    """The array of an .npy file, mapped, or of its bytes; None where there is none, or it is cut off."""
    try:
        with _NUMPY_HEADER:
            if isinstance(content, bytes):
                index: NDArray[np.int64] = np.load(BytesIO(content), allow_pickle=False)
            else:
                index = np.load(content, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return index.view(np.ndarray)


class ShardError(DataError):
    """A shard cannot be read; trying again may help."""


class Shard(ABC):
    """A part of a data set: a tar file, a folder, rows of a table. Its samples are read by number, in any order.

    It is copied to the loader's workers, so it holds where the samples are, not the samples.
    """

    name: str
    """A path or URL, by which errors name it; a run can be resumed where all names and lengths are the same."""

    def problem(self) -> str | None:
        """Why it cannot be read, where that shows before it is opened: a line that says what to do. None else."""
        return None

    def prepare(self, patience: Patience) -> None:  # noqa: B027
        """Make `len` and reading possible (find the samples, fetch the file); called before them, and again after a
        `ShardError`. Raises `ShardError`."""

    @abstractmethod
    def __len__(self) -> int:
        """Samples, those that cannot be used included. Raises `ShardError` where nobody knows."""

    @abstractmethod
    def __getitem__(self, number: int) -> Sample:
        """Sample `number`, undecoded; `Unusable` where it is known to be bad. Raises `ShardError`."""

    def __iter__(self) -> Iterator[Sample]:
        """All of them in order. Raises `ShardError`, after the samples that could be read."""
        self.prepare(PATIENCE)
        for number in range(len(self)):
            yield self[number]

    def fingerprint(self) -> str | None:
        """A text that changes when the samples do; None where only reading them can tell."""
        return None


def retry(read: Callable[[], T], shard: Shard, patience: Patience) -> T:
    """What `read` returns; after a `ShardError` the shard is prepared again, and read again. Raises the last one."""
    failures = 0
    while True:
        try:
            if failures:
                shard.prepare(patience)
            return read()
        except ShardError:
            if failures == patience.retries:
                raise
            wait_before_retry(failures)
            failures += 1


class Unusable(Mapping[str, Any]):
    """A sample that is known to be bad before anyone decodes it: each look at a field raises `BadSample`."""

    def __init__(self, key: str, url: str, reason: str) -> None:
        self._identity = {"__key__": key, "__url__": url}
        self.reason = reason

    def __getitem__(self, field: str) -> Any:
        if field in self._identity:
            return self._identity[field]
        raise BadSample(self.reason)

    def __iter__(self) -> Iterator[str]:
        return iter(self._identity)

    def __len__(self) -> int:
        return len(self._identity)


def check(shards: Sequence[Shard]) -> None:
    """Raises `DataError` where there are none, or some have a `problem`."""
    if not shards:
        raise DataError("no shards: the data source names none")
    if problems := [problem for shard in shards if (problem := shard.problem()) is not None]:
        more = f" (The first of {len(problems)}, of {len(shards)} shards.)" if len(problems) > 1 else ""
        raise DataError(problems[0] + more)


class Shards:
    """The samples of some shards, in order, read anew each time. Raises `DataError` where `check` does."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.shards = list(shards)
        check(self.shards)

    def __iter__(self) -> Iterator[Sample]:
        for shard in self.shards:
            yield from shard

    @property
    def place(self) -> str:
        """The shards' names."""
        return "\n".join(shard.name for shard in self.shards)

    def fingerprint(self) -> str | None:
        """Those of its shards; None where one has none."""
        prints = [shard.fingerprint() for shard in self.shards]
        return None if None in prints else "\n".join(map(str, prints))
