"""Shards of one cache folder: written once, atomically, to the same bytes; `manifest.json` checks them."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any
from uuid import uuid4

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Entry:
    """What the manifest keeps of a finished shard. `left_out`: concept -> why it has no picture here."""

    split: str
    style: str
    samples: int
    sha256: str
    left_out: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Drawn:
    """A sample: its key, its files by extension, and its json."""

    key: str
    files: dict[str, bytes]
    record: dict[str, Any]


def pack(samples: Iterable[Drawn]) -> bytes:
    """A WebDataset tar, the same bytes each time."""
    out = BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            text = json.dumps(sample.record, ensure_ascii=False, sort_keys=True).encode()
            for extension, data in (*sample.files.items(), ("json", text)):
                member = tarfile.TarInfo(f"{sample.key}.{extension}")  # mtime, uid and gid are 0
                member.size = len(data)
                tar.addfile(member, BytesIO(data))
    return out.getvalue()


def write(path: Path, data: bytes) -> None:
    """Write a whole file or nothing: a temporary name of this process, then a rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_manifest(folder: Path) -> dict[str, Entry]:
    """The finished shards by file name; {} where there is no manifest, or none that can be read."""
    try:
        shards = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["shards"]
        return {name: Entry(**entry) for name, entry in shards.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def write_manifest(folder: Path, made_from: dict[str, Any], entries: dict[str, Entry]) -> None:
    """`made_from` (options and package versions), the finished shards, and the samples by split and style."""
    counts: dict[str, dict[str, int]] = {}
    for entry in entries.values():
        styles = counts.setdefault(entry.split, {})
        styles[entry.style] = styles.get(entry.style, 0) + entry.samples
    shards = {name: asdict(entry) for name, entry in entries.items()}
    text = json.dumps({**made_from, "counts": counts, "shards": shards}, indent=1, sort_keys=True)
    write(folder / MANIFEST, text.encode())


def unfinished(folder: Path, names: Sequence[str]) -> list[str]:
    """Those of `names` that are not in the manifest, not on disk, or not the bytes that were written."""
    entries = read_manifest(folder)
    return [name for name in names if name not in entries or not _intact(folder / name, entries[name])]


def _intact(path: Path, entry: Entry) -> bool:
    try:
        return sha256(path.read_bytes()).hexdigest() == entry.sha256
    except OSError:
        return False


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which the system lets go of when a process dies; clears what a killed one left.

    Where there are no such locks (Windows) two processes write the same bytes under names of their own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(folder / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for left in folder.glob(".*.tmp"):
            left.unlink(missing_ok=True)
        yield
