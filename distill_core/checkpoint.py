"""Checkpoints: atomic, the last k and the best, read without running anybody's pickle."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distill_core.errors import UserError

VERSION = 1


class Checkpoints:
    """The `checkpoints` of a run folder: `step-00000240.pt`, ..., and `best.pt`."""

    def __init__(self, run: Path, keep: int = 2) -> None:
        self.folder = run / "checkpoints"
        self.keep = keep

    def steps(self) -> list[int]:
        """The steps that there are, in order."""
        names = [path.stem.removeprefix("step-") for path in self.folder.glob("step-*.pt")]
        return sorted(int(name) for name in names if name.isdecimal())

    def path(self, step: int) -> Path:
        """The file of a step."""
        return self.folder / f"step-{step:08d}.pt"

    def save(self, step: int, state: dict[str, Any], *, best: bool = False) -> Path:
        """Write completely or not at all; then drop all but the last `keep`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.path(step)
        temporary = self.folder / f".{path.name}.{os.getpid()}"
        try:
            with temporary.open("wb") as file:
                torch.save(state | {"version": VERSION, "step": step}, file)
                file.flush()
                os.fsync(file.fileno())
            if best:
                link = self.folder / f".best.{os.getpid()}"
                link.unlink(missing_ok=True)
                os.link(temporary, link)
                link.replace(self.folder / "best.pt")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        for old in self.steps()[: -self.keep]:
            self.path(old).unlink(missing_ok=True)
        return path

    def file(self, which: str = "last") -> Path:
        """The file of `last`, `best` or a step. Raises `UserError` when there is none."""
        steps = self.steps()
        if which == "best":
            path = self.folder / "best.pt"
        elif which == "last" and steps:
            path = self.path(steps[-1])
        elif which.isdecimal():
            path = self.path(int(which))
        else:
            path = self.folder / "step-*.pt"
        if not path.is_file():
            if os.sep in which or which.endswith(".pt"):
                raise UserError("--checkpoint takes `last`, `best` or a step's number, not a file")
            have = [str(step) for step in steps] + (["best"] if (self.folder / "best.pt").is_file() else [])
            raise UserError(
                f"{self.folder.parent}: no checkpoint {which!r}"
                + (f"; there are {', '.join(have)}" if have else ": the run has saved none yet")
            )
        return path

    def read(self, which: str = "last") -> dict[str, Any]:
        """The state of `last`, `best` or a step. Raises `UserError` when there is none or it cannot be read."""
        path = self.file(which)
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            older = [str(step) for step in self.steps() if self.path(step) != path]
            hint = f" Try --checkpoint {older[-1]}." if older else ""
            raise UserError(f"{path}: cannot be read ({type(error).__name__}: {error}).{hint}") from error
        if state.get("version") != VERSION:
            raise UserError(f"{path}: written in format {state.get('version')!r}; this distill reads format {VERSION}")
        return state


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
