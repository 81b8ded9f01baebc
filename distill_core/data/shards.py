"""Reading WebDataset shards: names, checks, and samples in order."""

from __future__ import annotations

import glob
import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from distill_core.errors import DataError
from distill_core.types import Sample

_BLOCK = 512
WILD = "*?["


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


def is_local(shard: str) -> bool:
    """Whether a shard is a file of this machine (not a URL, not `pipe:COMMAND`)."""
    return "://" not in shard and not shard.startswith("pipe:")


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
            with tarfile.open(shard) as tar:
                empty = tar.next() is None
        except (tarfile.ReadError, EOFError, OSError) as error:
            if Path(shard).stat().st_size:
                # tarfile tells of each kind of compression on a line of its own
                reason = str(error).splitlines()[0].rstrip(":")
                raise DataError(
                    f"{shard}: not a readable tar file: {reason}. Write it again, or leave it out."
                ) from error
            empty = True
        if empty:
            raise DataError(f"{shard}: the shard is empty. Write it again, or leave it out of data.source.")


def read_shard(shard: str) -> Iterator[Sample]:
    """The samples of a shard, in order, undecoded. Raises `DataError` with the shard's name."""
    from webdataset.tariterators import tarfile_samples

    try:
        yield from tarfile_samples([{"url": shard}])
    except (OSError, EOFError, ValueError, tarfile.TarError) as error:
        reason = str(error.args[0]) if error.args else type(error).__name__
        reason = reason.splitlines()[0].partition(" @ <")[0]  # webdataset adds its stream's repr
        raise DataError(f"{shard}: cannot be read: {reason[:200]}") from error
    if _cut_off(shard):
        raise DataError(f"{shard}: ends without a tar's closing block of zeros: it was cut off. Write it again.")


class Shards:
    """The samples of some shards, in order, read anew each time. Raises `DataError` where `check` does."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        check(self.names)

    def __iter__(self) -> Iterator[Sample]:
        for name in self.names:
            yield from read_shard(name)


def _cut_off(shard: str) -> bool:
    """Whether a local, uncompressed tar lacks its last block: `tarfile` takes a cut inside a header for the end."""
    if not is_local(shard) or not shard.endswith(".tar"):
        return False
    with open(shard, "rb") as file:
        file.seek(-min(_BLOCK, Path(shard).stat().st_size), os.SEEK_END)
        return file.read() != bytes(_BLOCK)


def as_sets(urls: Any) -> dict[str, list[str]]:
    """A pattern, a list of patterns, or {set: patterns} -> {set: shards}."""
    if isinstance(urls, dict):
        return {name: [shard for shards in as_sets(value).values() for shard in shards] for name, value in urls.items()}
    patterns = [urls] if isinstance(urls, str) else list(urls)
    return {"data": [shard for pattern in patterns for shard in expand(pattern)]}
