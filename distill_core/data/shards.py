"""WebDataset shards: their names, checks before a run, and their samples in order."""

from __future__ import annotations

import glob
import gzip
import lzma
import re
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

from distill_core.batch import Sample
from distill_core.data.opening import is_local, open_shard
from distill_core.data.tar import Damaged, members
from distill_core.errors import BadSample, DataError

WILD = "*?["
BACK_OFF = 1.0
"""Seconds before the first retry of a shard; each further one waits four times as long, up to a minute."""
_METADATA = re.compile(r"__[^/]*__($|/)")  # members that are no samples, as webdataset has it
_DAMAGED = (Damaged, EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError)
_UNREADABLE = (*_DAMAGED, OSError, HTTPException)


@dataclass(frozen=True)
class Patience:
    """How long a shard is tried before it counts as unreadable; the options of `data` with these names."""

    retries: int = 3
    timeout: float = 60.0


PATIENCE = Patience()


class Unusable(Mapping[str, Any]):
    """A sample that is known to be bad before anyone decodes it: each look at a field raises `BadSample`."""

    def __init__(self, key: str, url: str, reason: str) -> None:
        self._identity = {"__key__": key, "__url__": url}
        self._reason = reason

    def __getitem__(self, field: str) -> Any:
        if field in self._identity:
            return self._identity[field]
        raise BadSample(self._reason)

    def __iter__(self) -> Iterator[str]:
        return iter(self._identity)

    def __len__(self) -> int:
        return len(self._identity)


def expand(pattern: str) -> list[str]:
    """Brace lists (`{000..575}`) and, for local files, wildcards -> shard names in order."""
    from braceexpand import braceexpand

    names = list(braceexpand(pattern)) if "{" in pattern else [pattern]
    found: list[str] = []
    for name in names:
        if is_local(name) and any(sign in name for sign in WILD):
            found += sorted(glob.glob(name)) or [name]
        else:
            found.append(name)
    return found


def check(shards: Sequence[str]) -> None:
    """Raises `DataError` when local shards are missing, empty, or not tar files; others are checked when read."""
    if not shards:
        raise DataError("no shards: the data source names none")
    local = [shard for shard in shards if is_local(shard)]
    for shard in local:
        if Path(shard).is_dir():
            raise DataError(f"{shard}: is a folder; name the shards in it, as {Path(shard) / '*.tar'}")
        if any(sign in shard for sign in WILD) and not Path(shard).is_file():
            raise DataError(f"{shard}: no file matches. Check data.source, and the variables in it.")
    missing = [shard for shard in local if not Path(shard).is_file()]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise DataError(
            f"{len(missing)} of {len(shards)} shards do not exist: {', '.join(missing[:3])}{more}. "
            "Check data.source, and the variables in it."
        )
    for shard in local:
        try:
            with open_shard(shard, PATIENCE.timeout) as file:
                empty = next(members(file), None) is None
        except _UNREADABLE as error:
            empty = Path(shard).stat().st_size == 0
            if not empty:
                raise DataError(
                    f"{shard}: not a readable tar file: {_reason(error)}. Write it again, or leave it out."
                ) from error
        if empty:
            raise DataError(f"{shard}: the shard is empty. Write it again, or leave it out of data.source.")


def check_any(shards: Sequence[str]) -> None:
    """For a resumed run, which continues without shards that have gone since. Raises `DataError` where all have."""
    for shard in shards:
        with suppress(DataError):
            check([shard])
            return
    check(shards)


def read_shard(shard: str, patience: Patience = PATIENCE) -> Iterator[Sample]:
    """The samples of a shard, in order, undecoded. One with the key of the sample just before it is `Unusable`.

    What fails is tried again, and continues after the samples that were yielded; a local file that is damaged is
    damaged for good. Raises `DataError` with the shard's name where that does not help, or where there is no sample;
    the samples before the damage have been yielded by then.
    """
    yielded = failures = 0
    while True:
        count = 0
        try:
            for count, sample in enumerate(_samples(shard, patience.timeout), start=1):
                if count > yielded:
                    yielded, failures = count, 0
                    yield sample
            break
        except _Broken as broken:
            if broken.may_pass and failures < patience.retries:
                time.sleep(min(BACK_OFF * 4**failures, 60))
                failures += 1
                continue
            if broken.last is not None and count == yielded:
                yield broken.last
            raise DataError(f"{shard}: cannot be read: {broken}") from broken.__cause__
    if not yielded:
        raise DataError(f"{shard}: the shard is empty. Write it again, or leave it out of data.source.")


class _Broken(Exception):
    """Why a shard cannot be read to its end, and the sample that the damage follows, where that looks whole."""

    def __init__(self, shard: str, error: Exception, last: Sample | None) -> None:
        super().__init__(_reason(error))
        self.may_pass = not (is_local(shard) and isinstance(error, _DAMAGED))
        self.last = last


def _samples(shard: str, timeout: float) -> Iterator[Sample]:
    """Members that stand together and differ only in what follows the first dot of their names are one sample."""
    from webdataset.tariterators import base_plus_ext

    sample: dict[str, Any] = {}
    again = False  # whether its key is that of the sample before
    fields: Set[str] = set()  # of the sample before
    try:
        with open_shard(shard, timeout) as file:
            for name, content in members(file):
                key, field = base_plus_ext(name)
                if key is None or _METADATA.match(name):
                    continue
                field = field.lower()
                if sample and (key != sample["__key__"] or field in sample):
                    yield _closed(sample, again)
                    again, fields = key == sample["__key__"], sample.keys()
                    sample = {}
                if not sample:
                    sample = {"__key__": key, "__url__": shard}
                sample[field] = content
    except _UNREADABLE as error:
        whole = bool(fields) and fields <= sample.keys()
        raise _Broken(shard, error, _closed(sample, again) if whole else None) from error
    if sample:
        yield _closed(sample, again)


def _closed(sample: dict[str, Any], again: bool) -> Sample:
    if not again:
        return sample
    return Unusable(sample["__key__"], sample["__url__"], "its key is that of the sample just before it in the shard")


def _reason(error: Exception) -> str:
    """One line."""
    reason = str(getattr(error, "strerror", None) or error) or type(error).__name__
    return reason.splitlines()[0][:200]


class Shards:
    """The samples of some shards, in order, read anew each time. Raises `DataError` where `check` does."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        check(self.names)

    def __iter__(self) -> Iterator[Sample]:
        for name in self.names:
            yield from read_shard(name)


def as_sets(urls: Any) -> dict[str, list[str]]:
    """A pattern, a list of patterns, or {set: patterns} -> {set: shards}."""
    if isinstance(urls, dict):
        return {name: [shard for shards in as_sets(value).values() for shard in shards] for name, value in urls.items()}
    patterns = [urls] if isinstance(urls, str) else list(urls)
    return {"data": [shard for pattern in patterns for shard in expand(pattern)]}
