"""Whole runs on the ranks of one launch, and a step of one of them again; run by test_distributed_runs.

`python -m torch.distributed.run --nproc-per-node N distributed_runs.py RUNS`: of each folder in RUNS. Writes
RUNS.json: what the replay of the run `bad` shows.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import Tensor

from distill_core.interfaces import Loss
from distill_core.outputs import Outputs
from distill_core.registry import Entry, Registry
from distill_core.run.folder import RunFolder
from distill_core.run.load import run_recipe
from distill_core.run.replay import Replay, replay_step
from distill_core.system import distributed
from distill_core.train import Trainer

RESUMED = "stages-parts"
"""A run that begins its second half again, from the checkpoint of step 5."""


class Spread(Loss):
    """Of each picture; of a black one its root is not finite."""

    name = "spread"

    def forward(self, outputs: Outputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        spread = outputs.views["image"].groups[0].x[0].flatten(2).std(2).mean(1)  # [B]
        return {"spread": ((spread - 1e-4).sqrt() * outputs.student["image"].embedding[0, :, 0]).mean()}, {}


def components() -> Registry:
    return Registry([*Registry.discover().entries.values(), Entry(Spread, "mine", "mine")])


def train(folder: RunFolder, registry: Registry, resume: str | None = None) -> None:
    Trainer(run_recipe(folder.path, registry), folder, resume=resume, quiet=True).run()


def replay(folder: RunFolder, registry: Registry, step: int | None = None) -> Replay:
    """Of its bad step, or another."""
    step = step or next(row["step"] for row in folder.rows() if "not_finite" in row)
    return replay_step(run_recipe(folder.path, registry), folder, step, quiet=True)


def main() -> None:
    distributed.start(torch.device("cpu"))
    runs, registry = Path(sys.argv[1]), components()
    for path in sorted(runs.iterdir()):
        train(RunFolder(path), registry)
        if path.name == RESUMED:
            train(RunFolder(path), registry, "5")
    seen = replay(RunFolder(runs / "bad"), registry)
    if distributed.rank() == 0:
        shown = {"keys": seen.keys, "terms": seen.terms, "first_bad": seen.first_bad, "start": seen.start}
        runs.with_suffix(".json").write_text(json.dumps(shown))
    distributed.stop()


if __name__ == "__main__":
    main()
