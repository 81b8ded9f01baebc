"""What is noted of a step that was not finite, for `distill replay`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from distill_core.errors import UserError
from distill_core.system.files import write_whole

FOLDER = "bad-steps"
AT_MOST = 20
"""Captures of a run. What follows from weights that are bad already tells nothing new."""


@dataclass(frozen=True)
class Capture:
    """A step, and the state of the data and the random numbers right before it."""

    step: int
    problem: str
    seed: int
    position: int
    """Samples of all ranks before it, over all passes."""
    keys: list[str]
    """Of all ranks' samples, in order."""
    lr: float
    grad_norm: float | str
    ranks: list[dict[str, Any]]
    """Of each, `loss`, `terms` and `metrics` (a loss's scale among them)."""
    random: list[dict[str, Any]]
    """Of each, `plain_random`."""

    def random_of(self, rank: int) -> dict[str, Any]:
        """For `distill_core.system.process.set_random`."""
        return {
            name: torch.frombuffer(bytearray.fromhex(value), dtype=torch.uint8) if isinstance(value, str) else value
            for name, value in self.random[rank].items()
        }


def plain_random(state: Mapping[str, Any]) -> dict[str, Any]:
    """`distill_core.system.process.get_random`, with the bytes of its tensors in hexadecimal."""
    return {
        name: value.numpy().tobytes().hex() if isinstance(value, torch.Tensor) else value
        for name, value in state.items()
    }


def number(value: float) -> float | str:
    """As JSON has it: `nan` and `inf` as words."""
    return value if math.isfinite(value) else str(value)


def write_capture(run: Path, capture: Capture) -> Path | None:
    """Its file; None where there are `AT_MOST` already. Raises OSError."""
    path = run / FOLDER / f"step-{capture.step:08d}.json"
    path.parent.mkdir(exist_ok=True)
    if not path.exists() and len(list(path.parent.glob("step-*.json"))) >= AT_MOST:
        return None
    write_whole(path, json.dumps(asdict(capture)))
    return path


def later_captures(run: Path, step: int) -> list[Path]:
    """The files of steps after `step`."""
    files = (run / FOLDER).glob("step-*.json")
    return [path for path in files if int(path.stem.removeprefix("step-")) > step]


def read_capture(run: Path, step: int) -> Capture | None:
    """None where the run has not captured this step. Raises `UserError` for a file that is none."""
    path = run / FOLDER / f"step-{step:08d}.json"
    if not path.exists():
        return None
    try:
        return Capture(**json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, TypeError) as error:
        raise UserError(
            f"{path}: not a captured step ({error}); delete it, and the step is replayed without"
        ) from error
