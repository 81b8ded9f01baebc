"""COSMOS's run on two ranks, what it reads of the device and how often the ranks meet counted; run by
test_distributed.

`python -m torch.distributed.run --nproc-per-node 2 distributed_host_reads.py RECIPE RUN`: writes rank-N.json beside the
folder RUN.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from host_reads import HostReads

from distill_core.batch import Batch
from distill_core.outputs import Progress
from distill_core.recipe.resolve import load_recipe
from distill_core.registry import Registry
from distill_core.run.folder import RunFolder
from distill_core.step import StepResult, TrainStep
from distill_core.system import distributed, transfer
from distill_core.train import Trainer

STEPS = 8
SIGNALLED = 4
"""The step in which rank 1 gets a signal."""


def main() -> None:
    recipe = load_recipe(
        Path(sys.argv[1]),
        registry=Registry.discover(),
        overrides=["evaluate=null", "train.checkpoint.every=null", f"train.steps={STEPS}", "data.batch_size=2"],
    )
    trainer = Trainer(recipe, RunFolder(Path(sys.argv[2])), quiet=True)
    reads = HostReads()
    counts: list[int] = []  # reads so far, when each step had been launched
    met: list[int] = []  # steps before which the ranks met on the host
    upload, step, highest = transfer.Uploads.__call__, TrainStep.__call__, distributed.highest
    patched: Any = transfer.Uploads

    def uploading(self: transfer.Uploads, batch: Batch) -> Batch:
        moved = upload(self, batch)
        moved._map(lambda x: (reads.mark(x), x)[1])
        return moved

    def stepping(self: TrainStep, batch: Batch, progress: Progress, **options: Any) -> StepResult:
        end = time.monotonic() + 400
        while not trainer.loader.holds(2) and time.monotonic() < end:  # as where the device computes for long
            time.sleep(0.01)
        result = step(self, batch, progress, meet=trainer.lockstep.must_meet())
        if progress.step == SIGNALLED and distributed.rank() == 1:
            trainer.interrupt.signal = 15
        counts.append(len(reads.lines))
        return result

    def meeting(number: int, seconds: float | None = None) -> int:
        if not met or met[-1] != trainer.state.step:
            met.append(trainer.state.step)
        return highest(number, seconds)

    patched.__call__ = uploading
    patched = TrainStep
    patched.__call__ = stepping
    distributed.highest = meeting
    with reads:
        reads.mark(*trainer.objective.parameters(), *trainer.objective.buffers(), trainer.train_step.not_finite)
        trainer.run()
    numbers = {"counts": counts, "lines": reads.lines, "met": met, "step": trainer.state.step}
    Path(sys.argv[2]).with_name(f"rank-{distributed.rank()}.json").write_text(json.dumps(numbers))
    distributed.stop()


if __name__ == "__main__":
    main()
