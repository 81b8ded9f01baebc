"""Shards written one after another into a folder, so that a killed process continues where it was.

A shard is written under another name, renamed when it is whole, indexed, and then noted in the journal: what is not
noted is written again, to the same bytes. The report that takes the journal's place at the end names all that was
left out.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

from distill_core import BadSample, DataError, Patience, Skipped, TarShard, UserError, in_words, write_whole

SETLESS = "data"
"""The set of a source that names none."""
_BLOCK = 512


@dataclass(frozen=True)
class Packed:
    """A sample as it is written; `notes` are counted by name."""

    key: str
    fields: Mapping[str, bytes]
    notes: tuple[str, ...] = ()


@dataclass
class Entry:
    """A line of the journal: a shard that is whole. `file` is None where nothing of its samples could be used."""

    file: str | None
    set: str
    samples: int
    bytes: int
    end: int
    """The position in the row after its last sample."""
    skipped: list[dict[str, str]] = field(default_factory=list)
    notes: dict[str, int] = field(default_factory=dict)


class Folder:
    """The folder that a command writes to: journal while it runs, report when it is done."""

    def __init__(self, folder: Path, verb: str, made_from: dict[str, Any]) -> None:
        """`made_from` is all that decides the bytes, as json: another folder, or the same, continues this one."""
        self.folder, self.verb = folder, verb
        self.made_from = json.loads(json.dumps(made_from))
        self.entries: list[Entry] = []
        self.complete: dict[str, Any] | None = None
        """The report, where all of it stands there already."""
        self.report = folder / f"{verb}.json"
        self._journal = folder / f"{verb}.jsonl"

    @contextmanager
    def open(self) -> Iterator[None]:
        """Continue what stands there, alone. Raises `UserError` where it is something else."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.folder, os.O_RDONLY)  # the system lets go of it when the process dies
            try:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise UserError(f"{self.folder}: another process is writing to it") from None
                self._continue()
                yield
            finally:
                os.close(lock)
        except OSError as error:
            where = error.filename or self.folder
            raise UserError(
                f"{where}: {error.strerror or error}. The same command continues in {self.folder}"
            ) from error

    def _continue(self) -> None:
        made_from, entries = self._written()
        if made_from is None:
            if others := [path.name for path in sorted(self.folder.iterdir()) if not path.name.startswith(".")]:
                raise UserError(f"{self.folder}: holds {others[0]} already: name a folder of its own")
        elif made_from != self.made_from:
            differs = ", ".join(name for name in self.made_from if made_from.get(name) != self.made_from[name])
            raise UserError(f"{self.folder}: was begun with other {differs}: name another folder, or remove it")
        for entry in entries:
            path = None if entry.file is None else self.folder / entry.file
            if path is not None and not (path.is_file() and path.stat().st_size == entry.bytes):
                break
            self.entries.append(entry)
        if self.report.is_file() and len(self.entries) == len(entries):
            self.complete = json.loads(self.report.read_text(encoding="utf-8"))
        else:
            self._begin()

    def _begin(self) -> None:
        """A journal of the entries so far."""
        lines = [self.made_from, *map(asdict, self.entries)]
        write_whole(self._journal, "".join(f"{json.dumps(line)}\n" for line in lines))
        self.report.unlink(missing_ok=True)

    def restart(self) -> None:
        """Write all of it again."""
        self.entries = []
        self._begin()

    def _written(self) -> tuple[Any, list[Entry]]:
        if self.report.is_file():
            report = json.loads(self.report.read_text(encoding="utf-8"))
            return report["made_from"], [Entry(**entry) for entry in report["shards"]]
        if not self._journal.is_file():
            return None, []
        lines = []
        for line in self._journal.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n"):  # else the process was killed while it wrote the line
                lines.append(json.loads(line))
        return (lines[0], [Entry(**line) for line in lines[1:]]) if lines else (None, [])

    @property
    def end(self) -> int:
        """The position from which the row is still to be written."""
        return self.entries[-1].end if self.entries else 0

    def write(
        self,
        results: Iterable[Packed | Skipped],
        set_of: Callable[[int], str],
        is_full: Callable[[int, int, int], bool],
        noted: Callable[[], None] = lambda: None,
    ) -> None:
        """Write what stands in the row from `end` on: a shard ends where the set does, and where `is_full` says so of
        (samples, bytes, the next position). `noted` is called before each line of the journal."""
        shard: _OpenShard | None = None
        position = self.end
        previous: str | None = None
        try:
            for result in results:
                name = set_of(position)
                if shard is None:
                    shard, previous = _OpenShard(self.folder, name), None
                if isinstance(result, Packed) and result.key == previous:
                    # a reader takes it for a part of the sample before
                    reason = "its key is that of the sample just before it"
                    result = Skipped(result.key, shard.name, reason)
                shard.add(result)
                previous = result.key if isinstance(result, Packed) else previous
                position += 1
                if set_of(position) != name or is_full(shard.samples, shard.bytes, position):
                    self._note(shard, position, noted)
                    shard = None
        finally:
            if shard is not None:
                shard.discard()

    def _note(self, shard: _OpenShard, end: int, noted: Callable[[], None]) -> None:
        entry = shard.finish(sum(e.set == shard.set and e.file is not None for e in self.entries), end)
        noted()
        with open(self._journal, "a", encoding="utf-8") as file:
            file.write(f"{json.dumps(asdict(entry))}\n")
            file.flush()
            os.fsync(file.fileno())
        self.entries.append(entry)

    def finish(self, more: Mapping[str, Any]) -> dict[str, Any]:
        """Write the report in place of the journal, and return it."""
        files = [entry for entry in self.entries if entry.file is not None]
        skipped = [line for entry in self.entries for line in entry.skipped]
        notes: Counter[str] = Counter()
        for entry in self.entries:
            notes.update(entry.notes)
        report = {
            "samples": sum(entry.samples for entry in files),
            "bytes": sum(entry.bytes for entry in files),
            "skipped": dict(Counter(grouped(line["reason"], line["url"]) for line in skipped).most_common()),
            "notes": dict(notes),
            **more,
            "urls": self._urls(files),
            "made_from": self.made_from,
            "shards": [asdict(entry) for entry in self.entries],
        }
        write_whole(self.report, json.dumps(report, indent=1))
        self._journal.unlink(missing_ok=True)
        return report

    def _urls(self, files: list[Entry]) -> Any:
        """As `urls` of the source `webdataset` takes them."""
        patterns: dict[str, str] = {}
        for name in dict.fromkeys(entry.set for entry in files):
            paths = [str(self.folder / str(entry.file)) for entry in files if entry.set == name]
            first, last = paths[0], paths[-1]
            patterns[name] = first if first == last else f"{first[:-10]}{{{first[-10:-4]}..{last[-10:-4]}}}.tar"
        return next(iter(patterns.values())) if len(patterns) == 1 else patterns


class _OpenShard:
    """A shard that is being written, under a name of its own."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.set = folder, name
        self.name = re.sub(r"[^\w.-]", "_", name)
        self.samples = self.bytes = 0
        self.skipped: list[dict[str, str]] = []
        self.notes: Counter[str] = Counter()
        self._path = folder / f".{self.name}.part"
        self._tar: tarfile.TarFile | None = None

    def add(self, result: Packed | Skipped) -> None:
        """Write a sample, or note why it is not."""
        if isinstance(result, Skipped):
            self.skipped.append(asdict(result))
            return
        if self._tar is None:
            self._tar = tarfile.open(self._path, "w", format=tarfile.PAX_FORMAT, encoding="utf-8")  # noqa: SIM115
        self.notes.update(result.notes)
        for extension, content in result.fields.items():
            member = tarfile.TarInfo(f"{result.key}.{extension}")  # mtime, uid and gid are 0
            member.size = len(content)
            self._tar.addfile(member, BytesIO(content))
            self.bytes += _BLOCK + -(-member.size // _BLOCK) * _BLOCK
        self.samples += 1

    def finish(self, number: int, end: int) -> Entry:
        """Rename it to the set's shard of this number, and index it."""
        if self._tar is None:
            return Entry(None, self.set, 0, 0, end, self.skipped)
        self._tar.close()
        with open(self._path, "rb") as file:
            os.fsync(file.fileno())
        path = self.folder / f"{self.name}-{number:06d}.tar"
        self._path.replace(path)
        shard = TarShard(path)
        shard.prepare(Patience())
        if len(shard) != self.samples or shard.repeated:
            raise DataError(f"{path}: has {len(shard)} samples where {self.samples} were written; this is a bug")
        shard.write_index()
        return Entry(path.name, self.set, self.samples, path.stat().st_size, end, self.skipped, dict(self.notes))

    def discard(self) -> None:
        """It is written again by the process that continues."""
        if self._tar is not None:
            self._tar.close()
        self._path.unlink(missing_ok=True)


def member_key(key: str) -> str:
    """A key as a shard's members can bear it, and any tar program may unpack it: what would end the key (a dot), leave
    the folder or name metadata is written as %2E, %2F, %5F. Raises `BadSample` for none."""
    if not key or key.endswith("/") or "\0" in key:
        raise BadSample(f"its key {key!r} can be no file's name")
    *folders, name = key.split("/")
    folders = [part.replace(".", "%2E") if part in (".", "..") else part for part in folders]
    written = "/".join([*folders, name.replace(".", "%2E")])
    if written.startswith("/"):
        written = f"%2F{written.lstrip('/')}"
    return f"%5F{written[1:]}" if written.startswith("__") else written


def grouped(reason: str, url: str) -> str:
    """A reason without what differs from sample to sample: the shard's name, and numbers."""
    short = re.sub(r"0x[0-9a-f]+|(?<![\w-])\d+(?!\w)", "#", reason.removeprefix(f"{url}: "))
    return re.sub(r"'[^']*'|\"[^\"]*\"", "...", short)[:120]


def summary(report: Mapping[str, Any], what: str) -> Iterator[str]:
    """Lines that say what was written."""
    files = sum(entry["file"] is not None for entry in report["shards"])
    yield f"{report['samples']} samples in {files} shards, {in_words(report['bytes'])}{what}"
    for note, count in report["notes"].items():
        yield f"  {count} {note}"
    for reason, count in report["skipped"].items():
        yield f"  left out {count}: {reason}"
