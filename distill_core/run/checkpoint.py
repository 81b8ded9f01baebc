"""The checkpoints of a run: the last k and the best.

Each is an archive. Where tensors are spread over ranks, each rank writes its part of them to one of its own first
(`step-00000240.part-0-of-4.pt`); the checkpoint names their digests, so that they count from then on.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from distill_core.errors import UserError, warn
from distill_core.run import checkpoint_file
from distill_core.run.checkpoint_file import Damaged
from distill_core.run.parts import Parts, map_tree
from distill_core.system.files import cannot_write

VERSION = 2


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
        checkpoint_file.write(path, state | {"version": VERSION, "step": step}, self.best if best else None)
        earlier = [other for other in self.steps() if other < step]
        for old in earlier[: max(0, len(earlier) - (self.keep - 1))]:
            with suppress(OSError):  # harmless if it stays
                self.path(old).unlink()
        self._drop_parts()
        return path

    def save_part(self, step: int, number: int, count: int, tensors: Sequence[Tensor]) -> str:
        """Write one of the parts that a checkpoint of this step will name; returns its digest. Raises `UserError`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return checkpoint_file.write(_part(self.folder, step, number, count), list(tensors))

    def _parts(self) -> Iterator[tuple[int, Path]]:
        """(step, file) of the parts there are."""
        for path in self.folder.glob("step-*.part-*.pt"):
            yield int(path.name.removeprefix("step-").partition(".")[0]), path

    def _drop_parts(self) -> None:
        """Remove parts that no checkpoint names any more."""
        if parts := list(self._parts()):
            steps = set(self.steps())
            if self.best.is_file():
                with suppress(Damaged):
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
            except Damaged:
                is_earlier = False
            files += [] if is_earlier else [self.best]
        return files + parts if files else []

    def restart_from(self, checkpoint: Checkpoint) -> None:
        """Make it a step's file (it may have been only `best.pt`), so that `last` finds it. Raises `UserError`."""
        path = self.path(checkpoint.state["step"])
        if not path.exists():
            try:
                checkpoint_file.link(checkpoint.path, path)
            except OSError as error:
                raise UserError(cannot_write(path, error)) from error

    def _file(self, which: str) -> Path:
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
        damaged: list[Damaged] = []
        read_paths: set[Path] = set()
        path = self._file(which)
        while True:
            read_paths.add(path)
            try:
                checkpoint = _open(path)
            except FileNotFoundError:  # a running training has deleted it since, and saved another
                pass
            except Damaged as error:
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
            return _open(self.folder / checkpoint.name, check=False)
        except (FileNotFoundError, Damaged) as error:
            raise UserError(f"{checkpoint}: is not there on all ranks; run folders must be shared") from error

    def read(self, which: str = "last", warn: Callable[[str], None] = warn) -> dict[str, Any]:
        """The state of `load`, with whole tensors."""
        return self.load(which, warn).whole()


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The state in a checkpoint's file, with whole tensors. Raises `UserError` where it cannot be read."""
    try:
        return _open(path).whole()
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except Damaged as error:
        raise UserError(f"{error}.") from error


def _open(path: Path, *, check: bool = True) -> Checkpoint:
    """With the parts that it names. Raises as `checkpoint_file.read` does."""
    checkpoint = _read(path, check=check)
    state = checkpoint.state
    digests: list[str] = state.pop("parts", [])
    parts = []
    for number, digest in enumerate(digests):
        part = _part(path.parent, state["step"], number, len(digests))
        try:
            own, tensors = checkpoint_file.read(part, check=check, mapped=True)
        except FileNotFoundError as error:
            if not path.exists():
                raise
            raise Damaged(f"{path}: its part {part.name} is missing") from error
        if own != digest:
            raise Damaged(f"{part}: cannot be read (damaged: it is of another checkpoint)")
        parts.append(tensors)
    for places, shape, number in state.pop("spread", []):
        *folders, name = places
        inner = state
        for folder in folders:
            inner = inner[folder]
        inner[name] = Parts(shape, [part[number] for part in parts])
    return checkpoint


def _read(path: Path, *, check: bool = True) -> Checkpoint:
    """The file alone. Raises as `checkpoint_file.read` does, and `UserError` for one of another format."""
    digest, state = checkpoint_file.read(path, check=check)
    if state.get("version") != VERSION:
        raise UserError(f"{path}: written in format {state.get('version')!r}; this distill reads format {VERSION}")
    return Checkpoint(path, digest, state)


def _part(folder: Path, step: int, number: int, count: int) -> Path:
    return folder / f"step-{step:08d}.part-{number}-of-{count}.pt"


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
