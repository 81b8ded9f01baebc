"""A run whose ranks are killed at random; run by test_kills.

`python -m torch.distributed.run ... killed_ranks.py RECIPE RUNS KILLS [OVERRIDE ...]`: at each of the first KILLS
attempts of torchrun one rank gets a SIGKILL. Which one, at which step and how far into it is drawn, by the attempt's
number alone.
Each attempt adds lines of JSON to RUNS/kills.jsonl.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import distill_core.cli
from distill_core.interfaces import Loss
from distill_core.outputs import Outputs
from distill_core.registry import Entry, Registry
from distill_core.run.checkpoint import Checkpoints
from distill_core.system import distributed

RECIPE, RUNS, KILLS, OVERRIDES = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]
ATTEMPT = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
STEPS, SECONDS = 6, 0.4
"""The most steps that an attempt makes before one of its ranks is killed, and the most of the seconds after that."""


def note(what: str, step: int) -> None:
    saved = max((step for run in RUNS.glob("*/checkpoints") for step in Checkpoints(run.parent).steps()), default=0)
    row = {"attempt": ATTEMPT, "what": what, "rank": distributed.rank(), "step": step, "saved": saved}
    with (RUNS / "kills.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


class Deadly(Loss):
    """A little noise of every random generator, so that a wrong resume ends elsewhere; and the kill."""

    name = "deadly"
    first: int | None = None

    def forward(self, outputs: Outputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        step = outputs.progress.step
        if self.first is None:
            self.first = step
            if distributed.rank() == 0:
                note("starts", step)
        rng = np.random.default_rng((ATTEMPT, distributed.world_size()))
        victim, steps, seconds = rng.integers(distributed.world_size()), rng.integers(STEPS), rng.uniform(0, SECONDS)
        if ATTEMPT < KILLS and distributed.rank() == victim and step == self.first + steps:
            note("killed", step)
            threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
        noise = torch.rand(()) + np.random.rand() + random.random()
        return {"noise": noise * outputs.student["image"].embedding.mean()}, {}


def main() -> None:
    registry = Registry([*Registry.discover().entries.values(), Entry(Deadly, "mine", "mine")])
    patch: Any = distill_core.cli
    patch._registry = lambda: registry
    settings = [part for override in OVERRIDES for part in ("--set", override)]
    distill_core.cli.main(["run", RECIPE, "--runs", str(RUNS), "--quiet", *settings])


if __name__ == "__main__":
    main()
