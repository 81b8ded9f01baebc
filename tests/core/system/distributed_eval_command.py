"""`distill eval` of a run that saves another best checkpoint once the first rank has read one, before the second could;
run by test_distributed: `python -m torch.distributed.run --nproc-per-node 2 distributed_eval_command.py RUN`.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from distill_core.cli import main
from distill_core.run.checkpoint import Checkpoint, Checkpoints

run = Path(sys.argv[1])
replaced = run / "replaced"
load = Checkpoints.load


def first_then_second(self: Checkpoints, *arguments: Any, **options: Any) -> Checkpoint:
    if os.environ["RANK"] == "0":
        checkpoint = load(self, *arguments, **options)
        other = {name: torch.randn_like(value) for name, value in checkpoint.state["objective"].items()}
        self.save(checkpoint.state["step"], checkpoint.state | {"objective": other}, best=True)
        replaced.touch()
        return checkpoint
    while not replaced.exists():
        time.sleep(0.05)
    return load(self, *arguments, **options)


Checkpoints.load = first_then_second  # type: ignore[method-assign]
main(["eval", str(run), "--checkpoint", "best", "--json"])
