"""Checkpoints: written atomically, the last k and the best; read without unpickling code, and only if undamaged.

A checkpoint is the zip archive that `torch.save` writes, with the digest of that archive as its comment: both are in
one file, which is complete or absent. Where tensors are spread over ranks, each writes its part of them to a file
first (`step-00000240.part-0-of-4.pt`); the checkpoint names their digests, so that they count from then on.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor, nn

from distill_core.errors import UserError, warn
from distill_core.run.parts import Parts, map_tree
from distill_core.system.files import cannot_write, temporary_for

VERSION = 2
COMMENT = b"sha256:"
TAIL = 2 + len(COMMENT) + 64
"""Bytes of a comment with a digest, and of its length before it."""


@dataclass(frozen=True)
class Checkpoint:
    """The content of a file when it was read. `digest` is that of the content, and identifies the checkpoint.

    Tensors that ranks wrote in parts are `Parts`.
    """

    path: Path
    digest: str
    state: dict[str, Any]

    def whole(self) -> dict[str, Any]:
        """The state with whole tensors."""
        state: dict[str, Any] = map_tree(lambda x: x[:] if isinstance(x, Parts) else x, self.state)
        return state


class Checkpoints:
    """The `checkpoints` of a run folder: `step-00000240.pt`, ..., and `best.pt`."""

    def __init__(self, run: Path, keep: int = 2) -> None:
        self.folder = run / "checkpoints"
        self.best = self.folder / "best.pt"
        self.keep = keep

    def steps(self) -> list[int]:
        """The steps that have a file, in order."""
        names = [path.stem.removeprefix("step-") for path in self.folder.glob("step-*.pt")]
        return sorted(int(name) for name in names if name.isdecimal())

    def path(self, step: int) -> Path:
        """The file of a step."""
        return self.folder / f"step-{step:08d}.pt"

    def save(self, step: int, state: dict[str, Any], *, best: bool = False) -> Path:
        """Write a checkpoint completely or not at all; then delete the earlier ones except for the last `keep - 1`.

        Raises `UserError` when it cannot be written; existing checkpoints are then unchanged.
        """
        path = self.path(step)
        self.folder.mkdir(parents=True, exist_ok=True)
        _write(path, state | {"version": VERSION, "step": step}, self.best if best else None)
        earlier = [other for other in self.steps() if other < step]
        for old in earlier[: max(0, len(earlier) - (self.keep - 1))]:
            with suppress(OSError):  # harmless if it stays
                self.path(old).unlink()
        self._drop_parts()
        return path

    def save_part(self, step: int, number: int, count: int, tensors: Sequence[Tensor]) -> str:
        """Write one of the parts that a checkpoint of this step will name; returns its digest. Raises `UserError`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return _write(self.part(step, number, count), list(tensors))

    def part(self, step: int, number: int, count: int) -> Path:
        """The file of a part."""
        return self.folder / f"step-{step:08d}.part-{number}-of-{count}.pt"

    def _parts(self) -> Iterator[tuple[int, Path]]:
        """(step, file) of the parts there are."""
        for path in self.folder.glob("step-*.part-*.pt"):
            yield int(path.name.removeprefix("step-").partition(".")[0]), path

    def _drop_parts(self) -> None:
        """Remove parts that no checkpoint names any more."""
        if parts := list(self._parts()):
            steps = set(self.steps())
            if self.best.is_file():
                with suppress(_Damaged):
                    steps.add(_read(self.best).state["step"])
            for step, path in parts:
                if step not in steps:
                    with suppress(OSError):  # harmless if it stays
                        path.unlink()

    def later(self, step: int) -> list[Path]:
        """The files of later steps than `step`, and `best.pt` if it is from a later step or damaged.

        Empty if no step's file is later: a later `best.pt` alone was written right before a kill, and training will
        write the same one again.
        """
        files = [self.path(other) for other in self.steps() if other > step]
        parts = sorted(path for other, path in self._parts() if other > step)
        if files and self.best.is_file():
            try:
                is_earlier = _read(self.best).state["step"] <= step
            except _Damaged:
                is_earlier = False
            files += [] if is_earlier else [self.best]
        return files + parts if files else []

    def restart_from(self, checkpoint: Checkpoint) -> None:
        """Make it a step's file (it may have been only `best.pt`), so that `last` finds it. Raises `UserError`."""
        path = self.path(checkpoint.state["step"])
        if not path.exists():
            try:
                _link(checkpoint.path, path)
            except OSError as error:
                raise UserError(cannot_write(path, error)) from error

    def file(self, which: str = "last") -> Path:
        """The file of `last`, `best` or a step. Raises `UserError` when there is none."""
        steps = self.steps()
        if which == "best":
            path = self.best
        elif which == "last" and steps:
            path = self.path(steps[-1])
        elif which.isdecimal():
            path = self.path(int(which))
        else:
            path = self.folder / "step-*.pt"
        if not path.is_file():
            if os.sep in which or which.endswith(".pt"):
                raise UserError("--checkpoint takes `last`, `best` or a step's number, not a file")
            available = [str(step) for step in steps] + (["best"] if self.best.is_file() else [])
            raise UserError(
                f"{self.folder.parent}: no checkpoint {which!r}"
                + (f"; there are {', '.join(available)}" if available else ": the run has saved none yet")
            )
        return path

    def load(self, which: str = "last", warn: Callable[[str], None] = warn) -> Checkpoint:
        """`last`, `best` or a step; a damaged last one is skipped with a warning if there is an earlier one.

        Raises `UserError` when there is none or it cannot be read.
        """
        damaged: list[_Damaged] = []
        read_paths: set[Path] = set()
        path = self.file(which)
        while True:
            read_paths.add(path)
            try:
                checkpoint = self._open(path)
            except FileNotFoundError:  # a running training has deleted it since, and saved another
                pass
            except _Damaged as error:
                damaged.append(error)
            else:
                for problem in damaged:
                    warn(f"{problem}; using {path.name} instead")
                return checkpoint
            untried = [other for other in map(self.path, self.steps()) if other not in read_paths]
            if which != "last" or not untried:
                break
            path = untried[-1]
        if not damaged:
            raise UserError(f"{path}: was removed while it was read; try again")
        names = {self.best: "best"} | {self.path(step): str(step) for step in self.steps()}
        # best.pt and a step's file may be one file of two names
        damaged_inodes = [file.stat().st_ino for file in read_paths if file.is_file()]
        readable = [name for file, name in names.items() if file.is_file() and file.stat().st_ino not in damaged_inodes]
        hint = f" Try --checkpoint {readable[-1]}." if readable else ""
        raise UserError(f"{damaged[0]}.{hint}") from damaged[0]

    def reopen(self, checkpoint: Path) -> Checkpoint:
        """One that another rank has loaded, and checked. Raises `UserError`."""
        try:
            return self._open(self.folder / checkpoint.name, check=False)
        except (FileNotFoundError, _Damaged) as error:
            raise UserError(f"{checkpoint}: is not there on all ranks; run folders must be shared") from error

    def _open(self, path: Path, *, check: bool = True) -> Checkpoint:
        """With the parts that it names. Raises as `_read` does."""
        checkpoint = _read(path, check=check)
        digests: list[str] = checkpoint.state.pop("parts", [])
        parts = []
        for number, digest in enumerate(digests):
            part = self.part(checkpoint.state["step"], number, len(digests))
            try:
                parts.append(_read_part(part, digest, check=check))
            except FileNotFoundError as error:
                if not path.exists():
                    raise
                raise _Damaged(f"{path}: its part {part.name} is missing") from error
        for places, shape, number in checkpoint.state.pop("spread", []):
            *folders, name = places
            inner = checkpoint.state
            for folder in folders:
                inner = inner[folder]
            inner[name] = Parts(shape, [part[number] for part in parts])
        return checkpoint

    def read(self, which: str = "last", warn: Callable[[str], None] = warn) -> dict[str, Any]:
        """The state of `load`, with whole tensors."""
        return self.load(which, warn).whole()


class _Damaged(Exception):
    """What is wrong with a file, in words that follow its name."""


class _Hashed:
    """A file for `torch.save`: hashes and counts what is written.

    The first error is raised by `finish`: raised in `write`, it would surface as an internal error of torch's writer.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._hash = file, sha256()
        self._error: OSError | None = None
        self.size = TAIL - 2

    def write(self, data: memoryview) -> int:
        self.size += len(data)
        if self._error is None:
            self._hash.update(data)
            try:
                self._file.write(data)
            except OSError as error:
                self._error = error
        return len(data)

    def flush(self) -> None:
        """Does nothing: `save` flushes the file once the digest is written."""

    def finish(self) -> str:
        """Add the digest, which is returned. Raises OSError when anything could not be written."""
        if self._error is not None:
            raise self._error
        digest = self._hash.hexdigest()
        comment = COMMENT + digest.encode()
        self._file.seek(-2, os.SEEK_END)
        self._file.write(len(comment).to_bytes(2, "little") + comment)
        return digest


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The state in a checkpoint's file, with whole tensors. Raises `UserError` where it cannot be read."""
    checkpoints = Checkpoints(path.parent.parent)
    checkpoints.folder = path.parent
    try:
        return checkpoints._open(path).whole()
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except _Damaged as error:
        raise UserError(f"{error}.") from error


def _write(path: Path, content: Any, link: Path | None = None) -> str:
    """Write an archive and its digest, which is returned, completely or not at all; `link` is a second name for it.

    Raises `UserError`.
    """
    temporary = temporary_for(path)
    size = 0
    try:
        with temporary.open("wb") as file:
            archive = _Hashed(file)
            torch.save(content, cast(IO[bytes], archive))
            size = archive.size
            digest = archive.finish()
            file.flush()
            os.fsync(file.fileno())
        if link is not None:
            _link(temporary, link)
        temporary.replace(path)
    except OSError as error:
        raise UserError(cannot_write(path, error, size)) from error
    finally:
        with suppress(OSError):
            temporary.unlink()
    return digest


def _read(path: Path, *, check: bool = True) -> Checkpoint:
    """Reads digest and content from one open file, since another file may take its name at any time.

    Raises `_Damaged`; FileNotFoundError; `UserError` for a file without read permission or of another format.
    """
    checked = False
    try:
        with path.open("rb") as file:
            digest = _digest(file, check=check)
            checked = True
            file.seek(0)
            state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except (FileNotFoundError, MemoryError):
        raise
    except PermissionError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except _Damaged as error:
        raise _Damaged(f"{path}: cannot be read ({error})") from error
    except Exception as error:
        reason = str(error).partition("\n")[0]
        line = f"{path}: cannot be read ({type(error).__name__}: {reason})"
        raise (UserError(f"{line}.") if checked else _Damaged(line)) from error
    if state.get("version") != VERSION:
        raise UserError(f"{path}: written in format {state.get('version')!r}; this distill reads format {VERSION}")
    return Checkpoint(path, digest, state)


def _read_part(path: Path, digest: str, *, check: bool) -> list[Tensor]:
    """A part's tensors, whose bytes are read when they are used. Raises `_Damaged` and FileNotFoundError."""
    try:
        with path.open("rb") as file:
            if _digest(file, check=check) != digest:
                raise _Damaged("damaged: it is of another checkpoint")
        tensors: list[Tensor] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (FileNotFoundError, MemoryError):
        raise
    except _Damaged as error:
        raise _Damaged(f"{path}: cannot be read ({error})") from error
    return tensors


def _digest(file: IO[bytes], *, check: bool) -> str:
    """The digest in the archive's comment. Raises `_Damaged` where there is none; if `check`, where it is not that of
    the archive."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - TAIL))
    tail = file.read()
    length = (TAIL - 2).to_bytes(2, "little")
    if not tail.startswith(length + COMMENT):
        raise _Damaged("damaged: its digest differs from the saved one, or it is no checkpoint")
    saved = tail.removeprefix(length + COMMENT).decode(errors="replace")
    if check:
        digest = sha256()
        file.seek(0)
        remaining = size - TAIL
        while remaining > 0 and (part := file.read(min(remaining, 1 << 20))):
            digest.update(part)
            remaining -= len(part)
        digest.update(b"\0\0")  # the comment's length, as it was before there was one
        if digest.hexdigest() != saved:
            raise _Damaged("damaged: its digest differs from the saved one")
    return saved


def _link(source: Path, path: Path) -> None:
    """Give a file a second name, replacing any file of that name; a copy where the file system has no hard links."""
    temporary = temporary_for(path)
    with suppress(OSError):
        temporary.unlink()
    try:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
        temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink()


def load_into(module: nn.Module, state: dict[str, Any], what: str) -> None:
    """`module.load_state_dict(state)`. Raises `UserError`, which begins with `what`, when they do not fit."""
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        lines = str(error).splitlines()
        raise UserError(
            f"{what}: the checkpoint does not fit the recipe (has recipe.yaml been changed, or --set given?): "
            f"{lines[1 if len(lines) > 1 else 0].strip()[:200]}"
        ) from error
