"""The members of a WebDataset tar as samples, and a whole shard in order."""

from __future__ import annotations

import gzip
import lzma
import re
import zlib
from collections.abc import Iterator, Set
from dataclasses import dataclass
from http.client import HTTPException

from distill_core.batch import Sample
from distill_core.data.opening import is_local, open_shard
from distill_core.data.shard import PATIENCE, Patience, ShardError, Unusable, wait_before_retry
from distill_core.data.tar import Damaged, Member, members

_METADATA = re.compile(r"__[^/]*__($|/)")  # members that are no samples, as webdataset has it
DAMAGED = (Damaged, EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError)
UNREADABLE = (*DAMAGED, OSError, HTTPException)


def read_shard(shard: str, patience: Patience = PATIENCE) -> Iterator[Sample]:
    """The samples of a shard, in order, undecoded. One with the key of the sample just before it is `Unusable`.

    What fails is tried again, and continues after the samples that were yielded; a local file that is damaged is
    damaged for good. Raises `ShardError` with the shard's name where that does not help, or where there is no sample;
    the samples before the damage have been yielded by then.
    """
    yielded = failures = 0
    while True:
        count = 0
        try:
            with open_shard(shard, patience.timeout) as file:
                for count, run in enumerate(runs(members(file)), start=1):
                    if count > yielded:
                        yielded, failures = count, 0
                        yield run.sample(shard, run.again)
            break
        except (Broken, *UNREADABLE) as error:
            broken = error if isinstance(error, Broken) else None
            for_good = is_local(shard) and broken is not None and broken.is_damage
            if not for_good and failures < patience.retries:
                wait_before_retry(failures)
                failures += 1
                continue
            if broken is not None and broken.last is not None and count == yielded:
                yield broken.last.sample(shard, broken.last.again)
            raise ShardError(f"{shard}: cannot be read: {reason(error)}") from error
    if not yielded:
        raise ShardError(f"{shard}: the shard is empty. Write it again, or leave it out of data.source.")


@dataclass(slots=True)
class Run:
    """Members of one sample, at `start`:`end` of the tar; `again` where its key is that of the sample before."""

    key: str
    fields: dict[str, bytes]
    again: bool
    start: int
    end: int

    def sample(self, shard: str, again: bool) -> Sample:
        """Of the shard of this name; `Unusable` where its key is that of the sample before."""
        if again:
            return Unusable(self.key, shard, "its key is that of the sample just before it in the shard")
        return {"__key__": self.key, "__url__": shard, **self.fields}


class Broken(Exception):
    """Why a tar cannot be read to its end, and the sample that the damage follows, where that looks whole."""

    def __init__(self, error: Exception, last: Run | None) -> None:
        super().__init__(reason(error))
        self.is_damage = isinstance(error, DAMAGED)
        self.last = last


def runs(tar: Iterator[Member]) -> Iterator[Run]:
    """The samples of a tar's members. Raises `Broken`."""
    from webdataset.tariterators import base_plus_ext

    run: Run | None = None
    before: Set[str] = set()  # the fields of the sample before
    try:
        for member in tar:
            key, field = base_plus_ext(member.name)
            if key is None or _METADATA.match(member.name):
                continue
            field = field.lower()
            again = False
            if run is not None and (key != run.key or field in run.fields):
                yield run
                again, before = key == run.key, run.fields.keys()
                run = None
            if run is None:
                run = Run(key, {}, again, member.start, member.end)
            run.fields[field] = member.content
            run.end = member.end
    except UNREADABLE as error:
        whole = run is not None and bool(before) and before <= run.fields.keys()
        raise Broken(error, run if whole else None) from error
    if run is not None:
        yield run


def reason(error: Exception) -> str:
    """One line."""
    line = str(getattr(error, "strerror", None) or error) or type(error).__name__
    return line.splitlines()[0][:200]
