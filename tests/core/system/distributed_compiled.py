"""Steps of units that are compiled, checkpointed and spread over the ranks; run by test_distributed.

`python -m torch.distributed.run --nproc-per-node N distributed_compiled.py OUT` writes OUT/rank-R.pt: by way of
checkpointing, each step's terms and whole gradients.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from distributed_step import SAMPLES, batch, objective
from torch.distributed.tensor import DTensor

from distill_core import parallel
from distill_core.outputs import Progress
from distill_core.recipe.sections import ParallelConfig
from distill_core.system import distributed

CHECKPOINTING = ("none", "selective", "full")


def steps(kind: str) -> list[dict[str, Any]]:
    """Of one objective, without updates between them; the second's texts have another length."""
    torch._dynamo.reset()
    made = objective()
    config = ParallelConfig(compile=True, shard="all", checkpointing=kind)
    parallel.lay_out(made, config, torch.device("cpu"))
    share = SAMPLES // distributed.world_size()
    results = []
    for length in (7, 6, 8):
        rows = batch(distributed.rank() * share, (distributed.rank() + 1) * share, length)
        losses = made.losses(made.represent(rows, Progress(0, 1)))
        losses.total.backward()
        named = [(name, p) for name, p in made.named_parameters() if not name.startswith("teacher.")]
        distributed.average_gradients([p for _, p in named if not isinstance(p, DTensor)])
        gradients = {name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for name, p in named}
        results.append(
            {
                "terms": {name: term.detach() for name, term in losses.terms.items()},
                "gradients": gradients,
                "sharded": sum(isinstance(p, DTensor) for _, p in named),
                "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
            }
        )
        made.zero_grad()
    torch._dynamo.utils.counters.clear()
    return results


def main() -> None:
    distributed.start(torch.device("cpu"))
    compile_units = parallel.compile_units
    parallel.compile_units = lambda objective: compile_units(objective, "aot_eager")
    results = {kind: steps(kind) for kind in CHECKPOINTING}
    torch.save(results, Path(sys.argv[1]) / f"rank-{distributed.rank()}.pt")
    distributed.stop()


if __name__ == "__main__":
    main()
