"""Copies in the cache of shards that cannot be read at any place: a URL, what a command writes, a compressed file."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO

from distill_core.data.opening import is_local, open_shard
from distill_core.data.shard import Patience
from distill_core.data.tar_samples import DAMAGED, reason
from distill_core.system.files import cache_folder, cannot_write, make_room, temporary_for, write_whole

GIGABYTE = 10**9
_DAMAGE = ".damage"
"""Suffix of a note beside a copy: why the original could not be read to its end."""


class ShardCopy:
    """The copy of one shard. All processes share it: the first that needs it makes it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._damaged = 0  # of its copies, so far

    @property
    def file(self) -> Path:
        """Where it stands once it is made; a compressed file that has changed has another."""
        return cache_folder() / "shards" / f"{cache_key(self.name, fingerprint(self.name))}.tar"

    @property
    def damage(self) -> str | None:
        """Why the original could not be read to its end when it was copied; None where it could."""
        note = self.file.with_suffix(_DAMAGE)
        return note.read_text() if note.is_file() else None

    def is_worth_another(self, patience: Patience) -> bool:
        """Whether a damaged one is fetched again, since the transfer may be to blame; else what it holds is used."""
        self._damaged += 1
        return not is_local(self.name) and self._damaged <= patience.retries

    def fetch(self, patience: Patience) -> Path:
        """The file, made where it is missing. Raises what reading the original raises, and an `OSError` where there is
        no room."""
        copy = self.file
        copy.parent.mkdir(parents=True, exist_ok=True)
        with open(copy.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # another worker may be fetching it
            if copy.is_file():
                os.utime(copy)
                return copy
            temporary = temporary_for(copy)
            try:
                with open_shard(self.name, patience.timeout) as source, open(temporary, "wb") as target:
                    damage = None
                    try:
                        _copy_all(source, target, copy)
                    except DAMAGED as error:
                        if self.is_worth_another(patience):
                            raise
                        damage = reason(error)
                if damage is not None:
                    write_whole(copy.with_suffix(_DAMAGE), damage)
                temporary.replace(copy)
            finally:
                temporary.unlink(missing_ok=True)
        for removed in make_room(copy.parent, copy, patience.shard_cache * GIGABYTE, "*.tar"):
            removed.with_suffix(_DAMAGE).unlink(missing_ok=True)
        return copy


def fingerprint(name: str) -> str:
    """Of a local file name, size and time of change; of others the name."""
    if not is_local(name):
        return name
    try:
        status = os.stat(name)
    except OSError:  # whoever reads it will say so
        return f"{name} cannot be read"
    return f"{name} {status.st_size} {status.st_mtime_ns}"


def cache_key(name: str, version: str = "") -> str:
    """The name of a shard's files in the cache; `version`, where they are of what it holds now alone."""
    place = os.path.abspath(name) + version if is_local(name) else name
    return blake2b(os.fsencode(place), digest_size=16).hexdigest()


def _pieces(source: BinaryIO) -> Iterator[bytes]:
    """What comes, as it comes: what a decompressor has in hand is not lost where it fails after it."""
    read = getattr(source, "read1", source.read)
    while piece := read(1 << 16):
        yield piece


def _copy_all(source: BinaryIO, target: BinaryIO, copy: Path) -> None:
    """What fails while it is written is told from what fails while it is read."""
    for piece in _pieces(source):
        try:
            target.write(piece)
        except OSError as error:
            raise OSError(f"a copy of it is needed, and {cannot_write(copy, error)}") from error
