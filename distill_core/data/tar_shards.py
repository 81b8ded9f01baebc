"""WebDataset shards: their names, an index of each, and their samples, by number or in order."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from hashlib import blake2b
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit, urlunsplit

import numpy as np
from numpy.typing import NDArray

from distill_core.batch import REST_OF_SHARD, Sample
from distill_core.data.opening import compressed, is_local, open_shard, served_size
from distill_core.data.shard import PATIENCE, Patience, Shard, ShardError, Unusable, load_index
from distill_core.data.shard_copy import ShardCopy, cache_key, fingerprint
from distill_core.data.tar import BLOCK, Damaged, members, scan
from distill_core.data.tar_samples import DAMAGED, UNREADABLE, Broken, read_shard, reason, runs
from distill_core.errors import DataError, warn
from distill_core.system.files import cache_folder, temporary_for, write_bytes

WILD = "*?["
BESIDE = ".index.npy"
"""Suffix of the index that stands beside a shard (`distill data index`)."""
_FORMAT = 1
_GOOD, _REPEATED, _LOST = range(3)
"""States of an index's row: a sample, one with the key of the sample before it, the rest of a damaged shard."""


def expand(pattern: str) -> list[str]:
    """Brace lists (`{000..575}`) and, for local files, wildcards -> shard names in order."""
    from braceexpand import braceexpand

    names = list(braceexpand(pattern)) if "{" in pattern else [pattern]
    expanded: list[str] = []
    for name in names:
        if is_local(name) and any(sign in name for sign in WILD):
            expanded += sorted(glob.glob(name)) or [name]
        else:
            expanded.append(name)
    return expanded


def tar_shards(patterns: Any) -> dict[str, list[Shard]]:
    """A pattern, a list of patterns, or {set: patterns} -> {set: shards}; a set without a name is `data`."""
    if isinstance(patterns, dict):
        sets = {name: tar_shards(value).values() for name, value in patterns.items()}
        return {name: [shard for shards in parts for shard in shards] for name, parts in sets.items()}
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    return {"data": [TarShard(name) for pattern in patterns for name in expand(pattern)]}


class TarShard(Shard):
    """A tar in the WebDataset layout: members that stand together and differ only in what follows the first dot of
    their names are one sample.

    `prepare` reads its headers, once: the index that it makes is in the cache. One that stands beside the shard, as
    SHARD.index.npy, is taken in its place; with it a URL has a length before it is fetched. What cannot be read at any
    place (a URL, `pipe:COMMAND`, a compressed file) is copied to the cache, as much as `data.shard_cache` has room for.
    """

    def __init__(self, name: str | Path) -> None:
        self.name = str(name)
        self._index: NDArray[np.int64] | None = None
        """[1 + samples, 3]: (file's bytes, its time of change in ns, format), then (start, end, state) of each."""
        self._patience = PATIENCE
        self._copy = ShardCopy(self.name)

    def __getstate__(self) -> dict[str, Any]:
        """Without the index, which the other process maps from the cache."""
        return {**self.__dict__, "_index": None}

    def problem(self) -> str | None:
        """Of a file of this machine that is missing, or names more than a file."""
        if not is_local(self.name) or Path(self.name).is_file():
            return None
        if Path(self.name).is_dir():
            return f"{self.name}: is a folder; name the shards in it, as {Path(self.name) / '*.tar'}"
        what = "no file matches" if any(sign in self.name for sign in WILD) else "does not exist"
        return f"{self.name}: {what}. Check data.source, and the variables in it."

    def prepare(self, patience: Patience) -> None:
        """Raises `ShardError` for what cannot be opened, `DataError` for what is no tar or holds no sample.

        A copy that is damaged is fetched again, `retries` times: the transfer may be to blame.
        """
        self._patience = patience
        if (index := self._stored_index()) is None and (index := self._index_beside()) is None:
            with self._readable():
                index = self._build_index()
        if len(index) == 1 or index[0, 0] == 0:
            raise DataError(f"{self.name}: the shard is empty. Write it again, or leave it out of data.source.")
        if index[1, 2] == _LOST:
            raise DataError(f"{self.name}: not a readable tar file: {self._damage}. Write it again, or leave it out.")
        self._index = index

    def __len__(self) -> int:
        if self._index is None:
            self.prepare(self._patience)
        assert self._index is not None
        return len(self._index) - 1

    def __getitem__(self, number: int) -> Sample:
        if not 0 <= number < len(self):
            raise IndexError(f"{self.name}: has {len(self)} samples")
        assert self._index is not None
        start, end, state = (int(value) for value in self._index[1 + number])
        if state == _LOST:
            return Unusable(REST_OF_SHARD, self.name, f"{self.name}: cannot be read: {self._damage}")
        with self._readable():
            content = self._read(start, end - start)
        try:
            *_, run = runs(members(BytesIO(content), part=True))
        except (Broken, ValueError) as error:  # its bytes have changed, and not its size nor its time of change
            return Unusable(f"(sample {number})", self.name, reason(error))
        return run.sample(self.name, again=state == _REPEATED)

    def __iter__(self) -> Iterator[Sample]:
        """In order, without a copy and without an index; what fails is tried again, and continues where it was."""
        return read_shard(self.name)

    @property
    def repeated(self) -> int:
        """Samples that cannot be used because their key is that of the sample just before. After `prepare`."""
        return self._count(_REPEATED)

    @property
    def damage(self) -> str | None:
        """Why it cannot be read to its end, None where it can. After `prepare`."""
        return self._damage if self._count(_LOST) else None

    def _count(self, state: int) -> int:
        assert self._index is not None, "not prepared"
        return int((self._index[1:, 2] == state).sum())

    def write_index(self) -> Path:
        """Write its index beside it, whole or not at all; after `prepare`. Raises `DataError`, and `OSError`."""
        assert self._index is not None, "not prepared"
        if self.is_copied:
            raise DataError(f"{self.name}: only an uncompressed tar of this machine has its index beside it")
        with open(self.name, "rb") as file:
            head = (int(self._index[0, 0]), _ends_digest(file, self._index), _FORMAT)
        file_bytes = BytesIO()
        np.save(file_bytes, np.concatenate([np.array([head], np.int64), self._index[1:]]))
        write_bytes(path := Path(self.name + BESIDE), file_bytes.getvalue())
        return path

    def fingerprint(self) -> str:
        """Of a local file name, size and time of change; of others the name."""
        return fingerprint(self.name)

    @contextmanager
    def _readable(self) -> Iterator[None]:
        """Damage of a file of this machine stays; all else may pass, also a change that is not over yet."""
        try:
            yield
        except UNREADABLE as error:
            for_good = isinstance(error, DAMAGED) and is_local(self.name)
            raise (DataError if for_good else ShardError)(f"{self.name}: cannot be read: {reason(error)}") from error

    def _file(self) -> Path:
        """A local tar file with its samples, which is copied to the cache where there is none."""
        return self._copy.fetch(self._patience) if self.is_copied else Path(self.name)

    @cached_property
    def is_copied(self) -> bool:
        """Whether it is read from a copy in the cache."""
        return not is_local(self.name) or compressed(self.name)

    def _read(self, start: int, length: int) -> bytes:
        assert self._index is not None
        with open(self._file(), "rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            changed = (status.st_size, 0 if self.is_copied else status.st_mtime_ns) != tuple(self._index[0, :2])
            if changed or len(content := os.pread(file.fileno(), length, start)) < length:
                raise ShardError(f"{self.name}: has changed since the run began")
        return content

    @property
    def _index_file(self) -> Path:
        version = self.fingerprint() if self.is_copied else ""  # which a copy follows
        return cache_folder() / "indexes" / f"{cache_key(self.name, version)}.npy"

    def _stored_index(self) -> NDArray[np.int64] | None:
        """That of the cache, if it is of the file as it is now; of a file that has gone, as it was."""
        index = load_index(self._index_file)
        if index is None or not _is_index(index):
            return None
        if not self.is_copied:
            with suppress(FileNotFoundError):
                status = os.stat(self.name)
                if (status.st_size, status.st_mtime_ns) != tuple(index[0, :2]):
                    return None
        return index

    def _index_beside(self) -> NDArray[np.int64] | None:
        """That beside a tar or its URL, if it is of what stands there now; kept in the cache from then on."""
        path = index_beside(self.name)
        if path is None:
            return None
        try:
            if is_local(self.name):
                index = _loaded(Path(path).read_bytes())
                with open(self.name, "rb") as file:
                    status = os.fstat(file.fileno())
                    fits = index is not None and tuple(index[0, :2]) == (status.st_size, _ends_digest(file, index))
                changed = status.st_mtime_ns
            else:
                with open_shard(path, self._patience.timeout) as file:
                    index = _loaded(file.read())
                if index is None:  # a server may answer anything for what it does not have
                    return None
                fits, changed = index[0, 0] == served_size(self.name, self._patience.timeout), 0
        except UNREADABLE:  # there is none; if the shard cannot be read either, reading it says why
            return None
        if not fits or index is None:
            warn(f"{path}: is not of the shard as it is now, and is not used. Write it again: distill data index")
            return None
        index[0, 1] = changed
        self._save(index)
        return index

    def _build_index(self) -> NDArray[np.int64]:
        rows: list[tuple[int, int, int]] = []
        with open(path := self._file(), "rb") as file:
            status = os.fstat(file.fileno())
            try:
                for run in runs(scan(file)):
                    rows.append((run.start, run.end, _REPEATED if run.again else _GOOD))
            except Broken as broken:
                if self._copy.is_worth_another(self._patience):
                    path.unlink(missing_ok=True)
                    raise Damaged(str(broken)) from broken
                if broken.last is not None:
                    rows.append((broken.last.start, broken.last.end, _REPEATED if broken.last.again else _GOOD))
                rows.append((rows[-1][1] if rows else 0, status.st_size, _LOST))
            else:
                if self.is_copied and self._copy.damage is not None:
                    rows.append((status.st_size, status.st_size, _LOST))
        head = (status.st_size, 0 if self.is_copied else status.st_mtime_ns, _FORMAT)
        index = np.array([head, *rows], dtype=np.int64)
        self._save(index)
        return index

    def _save(self, index: NDArray[np.int64]) -> None:
        """In the cache."""
        target = self._index_file
        with suppress(OSError):  # it is made again by the next run
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = temporary_for(target)
            with open(temporary, "wb") as file:
                np.save(file, index)
            temporary.replace(target)

    @property
    def _damage(self) -> str:
        """Why it cannot be read to its end."""
        try:
            path = self._file()
            if self.is_copied and (damage := self._copy.damage) is not None:
                return damage
            with open(path, "rb") as file:
                for _ in runs(scan(file)):
                    pass
        except Broken as broken:
            return str(broken)
        except UNREADABLE as error:
            return reason(error)
        return "it was damaged when the run began"


def index_beside(shard: str) -> str | None:
    """Where the index of a shard stands if it is beside it: of a file or an http(s) URL; None of others."""
    if is_local(shard):
        return shard + BESIDE
    if shard.startswith(("http://", "https://")):
        parts = urlsplit(shard)
        return urlunsplit(parts._replace(path=parts.path + BESIDE))
    return None


def _is_index(index: NDArray[np.int64]) -> bool:
    return index.ndim == 2 and index.shape[1] == 3 and index.dtype == np.int64 and index[0, 2] == _FORMAT


def _loaded(data: bytes) -> NDArray[np.int64] | None:
    """An index from its bytes; None where they are none."""
    index = load_index(data)
    return index if index is not None and _is_index(index) else None


def _ends_digest(file: BinaryIO, index: NDArray[np.int64]) -> int:
    """Of the headers of a tar's first and last sample: another tar of the same size has others. 63 bits."""
    digest = blake2b(digest_size=8)
    for row in index[1:][[0, -1]] if len(index) > 1 else ():
        file.seek(int(row[0]))
        digest.update(file.read(BLOCK))
    return int.from_bytes(digest.digest(), "little") >> 1
