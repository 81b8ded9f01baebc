"""A run of several ranks of which one fails; run by test_distributed and test_faults.

`python -m torch.distributed.run --nproc-per-node 2 distributed_failures.py RECIPE RUNS WHERE STEP [RANK]`: rank RANK
(1) fails at step STEP (from 0), WHERE its batch is made (`batch`) or in the step, where the others are in a collective
(`step`; `killed`: by SIGKILL; `once`: killed at torchrun's first attempt alone; `term`: it gets a SIGTERM; `term_all`:
all ranks get one; `stalls`: it waits for the file RUNS/go). `row`: rank 0 fails where it writes the step's row, in the
step after it.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

import distill_core.cli
import distill_core.run.stalls
from distill_core.batch import Sample, View
from distill_core.interfaces import Loss
from distill_core.outputs import Outputs, Progress
from distill_core.registry import Entry, Registry
from distill_core.system import distributed
from distill_core.teachers.copies import Ema
from distill_vl.captions import CaptionAugmentation, CaptionConfig

RECIPE, RUNS, WHERE, STEP = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
RANK = int(sys.argv[5]) if len(sys.argv) > 5 else 1
BATCH = 4


def stall() -> None:
    """In a component: until the file RUNS/go is there."""
    while not Path(RUNS, "go").exists():
        time.sleep(0.1)


class Slips(CaptionAugmentation):
    """Rank RANK cannot make the batch of step STEP."""

    name = "slips"
    Config = CaptionConfig
    made: ClassVar[int] = 0

    @classmethod
    def roles(cls, config: CaptionConfig) -> tuple[str, ...]:
        return ("global",)

    def train_views(self, sample: Sample, rng: np.random.Generator) -> list[View]:
        Slips.made += 1
        if WHERE == "batch" and distributed.rank() == RANK and Slips.made > STEP * BATCH:
            raise ZeroDivisionError("a slip of the plugin")
        return [View("a bird")]


class SlipsLate(Ema):
    """Cannot say its metrics."""

    name = "slips_late"

    def metrics(self, progress: Progress) -> Mapping[str, float]:
        if progress.step == STEP:
            raise ZeroDivisionError("a slip of the plugin")
        return super().metrics(progress)


class RankLoss(Loss):
    """The rank's number, as its value and as a metric."""

    name = "rank_loss"

    def forward(self, outputs: Outputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        if outputs.progress.step == STEP and (WHERE == "term_all" or (WHERE == "term" and distributed.rank() == RANK)):
            os.kill(os.getpid(), signal.SIGTERM)
        if distributed.rank() == RANK and outputs.progress.step == STEP:
            if WHERE == "stalls":
                stall()
            if WHERE == "step":
                raise ZeroDivisionError("a slip of the plugin")
            if WHERE == "killed" or (WHERE == "once" and not distributed.restarted()):
                os.kill(os.getpid(), signal.SIGKILL)
        number = torch.tensor(float(distributed.rank()))
        everyone = outputs.student["image"].gathered
        return {"rank_loss": everyone.mean() * 0 + 2 * number}, {"rank": number}


def main() -> None:
    mine = [Entry(cls, "mine", "mine") for cls in (Slips, SlipsLate, RankLoss)]
    registry = Registry([*Registry.discover().entries.values(), *mine])
    patch: Any = distill_core.cli
    patch._registry = lambda: registry
    distill_core.run.stalls.SECONDS_TO_ANSWER = 60.0  # on a busy machine, too
    settings = (
        "fusion=null",
        "teacher=slips_late" if WHERE == "row" else "teacher=null",
        "evaluate=null",
        "augment.text={name: slips}",
        "loss=[{name: rank_loss}]",
        "train.steps=8" if WHERE == "row" else "train.steps=6",
        "train.checkpoint.every=2",
        "train.stall_warning=4",
    )
    overrides = [part for setting in settings for part in ("--set", setting)]
    distill_core.cli.main(["run", RECIPE, "--runs", RUNS, *overrides])


if __name__ == "__main__":
    main()
