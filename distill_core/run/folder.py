"""A run's folder: its recipe, its lock, metrics.jsonl and the list of skipped samples."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import IO, Any
from weakref import WeakSet

from distill_core.batch import REST_OF_SHARD, WHOLE_SHARD, Skipped
from distill_core.errors import UserError, counted, warn
from distill_core.recipe.sections import Recipe
from distill_core.run.capture import later_captures
from distill_core.system.files import cannot_write, remove_temporaries, write_whole


class RunFolder:
    """`recipe.yaml`, `metrics.jsonl`, `skipped.jsonl`, `checkpoints/`, `report.json`, `report.png`; where there was a
    reason, `bad-steps/` and `stalls/`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = path / "metrics.jsonl"
        self.skipped = path / "skipped.jsonl"
        self.warn: Callable[[str], None] = warn
        self.on_row: Callable[[Mapping[str, Any]], None] = lambda row: None
        """Called with each row of metrics.jsonl, once it is written."""
        self._lock: IO[str] | None = None
        self._waiting: dict[Path, list[str]] = {}

    @classmethod
    def create(cls, base: Path, recipe: Recipe, launch: str | None = None) -> RunFolder:
        """A new folder `base/NAME`, or `base/NAME-2`, ... where that exists; it keeps the resolved recipe.

        `launch` names what starts the run, for `of_launch`.
        """
        for path in _candidates(base, recipe):
            try:
                path.mkdir(parents=True)
            except FileExistsError:
                continue
            except OSError as error:
                raise UserError(f"{path}: cannot be created: {error}. Choose another folder with --runs.") from error
            folder = cls(path)
            try:
                folder.restore(recipe)
            except UserError:
                path.rmdir()
                raise
            if launch is not None:
                write_whole(path / ".launch", _launch(launch, recipe))
            return folder
        raise UserError(f"{base / recipe.name}: too many runs of this name; give another with --set name=...")

    @classmethod
    def of_launch(cls, base: Path, recipe: Recipe, launch: str) -> RunFolder | None:
        """The newest folder that this launch began with exactly this recipe."""
        last = None
        for path in _candidates(base, recipe):
            if not path.exists():
                break
            mark = path / ".launch"
            if mark.exists() and mark.read_text(encoding="utf-8") == _launch(launch, recipe):
                last = cls(path)
        return last

    def restore(self, recipe: Recipe) -> None:
        """Create the folder and its recipe where they are missing: the folder is new, or somebody removed it.

        Raises `UserError`.
        """
        path = self.path / "recipe.yaml"
        try:
            if not path.exists():
                self.path.mkdir(parents=True, exist_ok=True)
                write_whole(path, recipe.to_yaml())
                if self._lock is not None:  # of the folder that was removed
                    self.unlock()
                    self.lock()
        except OSError as error:
            raise UserError(cannot_write(path, error)) from error

    def lock(self) -> None:
        """Prevent other processes from training in this folder while this one runs, and remove partly written files
        of killed ones. Raises `UserError`."""
        try:
            import fcntl
        except ImportError:  # no such locks on this system
            return
        try:
            self._lock = (self.path / ".lock").open("w")
        except OSError as error:
            raise UserError(f"{cannot_write(self.path / '.lock', error)}; a run needs a folder to write to") from error
        _locked.add(self)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.unlock()
            raise UserError(f"{self.path}: another process is training in this run folder") from error
        for folder in (self.path, self.path / "checkpoints"):
            remove_temporaries(folder)

    def unlock(self) -> None:
        """Let other processes train in this folder again."""
        if self._lock is not None:
            import fcntl

            fcntl.flock(self._lock, fcntl.LOCK_UN)
            self.drop_lock()

    def drop_lock(self) -> None:
        """Leave the lock to the process that this one was forked from."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def log(self, row: Mapping[str, Any]) -> None:
        """Append one row to metrics.jsonl; what is not finite is null there, which JSON has no number for."""
        self._append(self.metrics, [_finite(row)])
        self.on_row(row)

    def rows(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl; a last line that was cut off by a kill is left out."""
        return list(_jsonl(self.metrics))

    def skip(self, step: int, samples: Sequence[Skipped], split: str = "train") -> None:
        """Append samples that were skipped for a step's batch, or in scoring a split, to skipped.jsonl."""
        rows = [
            {"step": step, "split": split, "key": sample.key, "shard": sample.url, "reason": sample.reason}
            for sample in samples
        ]
        self._append(self.skipped, rows)

    def _append(self, path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows that cannot be written wait for the next ones, so that none is missing once there is room again."""
        is_first_failure, start, written = not self._waiting, 0, 0
        lines = self._waiting.pop(path, []) + [json.dumps(row) + "\n" for row in rows]
        if not lines:
            return
        data = "".join(lines).encode()
        try:
            with path.open("ab", buffering=0) as file:
                start = file.tell()
                while written < len(data):
                    written += file.write(data[written:])
        except OSError as error:
            with suppress(OSError):
                if written and path.stat().st_size == start + written:
                    os.truncate(path, start)  # no half of a row
            if is_first_failure:
                self.warn(
                    f"{cannot_write(path, error)}; training continues, and its rows are kept in memory until it can be"
                )
            self._waiting[path] = lines

    def write_waiting(self) -> list[str]:
        """Try once more to write the waiting rows; returns a line for each file that still lacks rows."""
        for path in list(self._waiting):
            self._append(path, [])
        return [f"{path}: {counted(len(lines), 'row')} could not be written" for path, lines in self._waiting.items()]

    def skipped_in_training(self) -> tuple[int, int]:
        """(distinct samples that training skipped, shards that it skipped wholly or from some sample on)."""
        rows = [row for row in _jsonl(self.skipped) if row.get("split", "train") == "train"]
        shards = {row["shard"] for row in rows if row["key"] in (WHOLE_SHARD, REST_OF_SHARD)}
        samples = {(row["shard"], row["key"]) for row in rows if row["key"] not in (WHOLE_SHARD, REST_OF_SHARD)}
        return len(samples), len(shards)

    def set_aside(self, checkpoints: Sequence[Path], step: int) -> Path:
        """Move checkpoints, report and captures of steps after `step` to a new folder `set-aside-N`, with copies of
        recipe, metrics, skipped samples.

        It is a run folder itself, which can be scored and resumed. Raises `UserError`.
        """
        folder = next(path for n in count(1) if not (path := self.path / f"set-aside-{n}").exists())
        try:
            (folder / "checkpoints").mkdir(parents=True)
            for path in (self.path / "recipe.yaml", self.metrics, self.skipped):
                if path.exists():
                    shutil.copy2(path, folder)
            for name in ("report.json", "report.png"):
                if (self.path / name).exists():
                    (self.path / name).replace(folder / name)
            for path in checkpoints:
                path.replace(folder / "checkpoints" / path.name)
            for path in later_captures(self.path, step):
                (folder / path.parent.name).mkdir(exist_ok=True)
                path.replace(folder / path.parent.name / path.name)
        except OSError as error:
            raise UserError(cannot_write(folder, error)) from error
        return folder

    def rewind(self, step: int, steps: int) -> None:
        """Delete the rows that a run of `steps` steps, resumed at `step`, will write again. Raises `UserError`."""
        for path in (self.metrics, self.skipped):
            if not path.exists():
                continue
            # the evaluations after the last step are made again when the run ended among them
            rows = [r for r in _jsonl(path) if r["step"] <= step and not ("scores" in r and r["step"] == steps)]
            try:
                write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))
            except OSError as error:
                raise UserError(cannot_write(path, error)) from error


def _candidates(base: Path, recipe: Recipe) -> Iterator[Path]:
    """The folders that runs of this name may have, in order."""
    return (base / (recipe.name if i == 1 else f"{recipe.name}-{i}") for i in range(1, 10_000))


def _launch(name: str, recipe: Recipe) -> str:
    return f"{name}\n{hashlib.sha256(recipe.to_yaml().encode()).hexdigest()}\n"


_locked: WeakSet[RunFolder] = WeakSet()


def _drop_locks() -> None:
    for folder in list(_locked):
        folder.drop_lock()


if hasattr(os, "register_at_fork"):
    # loader workers inherit the open file; one that outlives a killed trainer would keep the folder locked
    os.register_at_fork(after_in_child=_drop_locks)


def read_report(folder: Path) -> dict[str, Any] | None:
    """The report of a finished run, else None (a kill may have truncated it)."""
    try:
        report: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return report


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _jsonl(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                if line.endswith("\n"):
                    raise UserError(f"{path}: not a row of json: {line.strip()[:80]!r}") from None
