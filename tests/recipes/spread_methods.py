"""Methods whose towers are spread over ranks, on this rank's rows of a joint batch; run by test_spread_methods.

`python -m torch.distributed.run --nproc-per-node N spread_methods.py OUT` writes OUT/rank-R.pt.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from beside import load_beside
from torch import Tensor

from distill_core.outputs import Progress
from distill_core.parallel import lay_out
from distill_core.recipe.build import build_objective
from distill_core.recipe.sections import ParallelConfig
from distill_core.registry import Registry
from distill_core.step import TrainStep
from distill_core.system import distributed

methods = load_beside(__file__, "distributed_methods")
SAMPLES: int = methods.SAMPLES
LAYOUTS: dict[str, dict[str, Any]] = {
    "copies": {},
    "parts": {"shard": "all"},
    "parts of two": {"shard": 2},
    "full": {"checkpointing": "full", "shard": "all"},
    "selective": {"checkpointing": "selective"},
    "few at a time": {"micro_batch": 2},
    "few in parts": {"micro_batch": 2, "shard": "all", "checkpointing": "full"},
}
STEPS = 3


def full(tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    """Whole tensors; every rank must ask."""
    return {name: (x.full_tensor() if distributed.is_spread(x) else x).detach().clone() for name, x in tensors.items()}


def train(case: str, layout: str, registry: Registry, first: int, last: int) -> dict[str, Any]:
    """The first step's terms and gradients, and student and teacher after a few steps of the trainer."""
    parsed = methods.recipe(case, registry)
    options = {"parallel": ParallelConfig(**LAYOUTS[layout]), "clip_grad": 0.5}
    parsed = parsed.model_copy(update={"train": parsed.train.model_copy(update=options)})
    torch.manual_seed(0)
    made = build_objective(parsed).double()
    with torch.no_grad():
        for parameter in [*made.backbone.parameters(), *made.loss.parameters()]:  # away from ones and zeros
            parameter += 0.1 * torch.randn_like(parameter)
    lay_out(made, parsed.train.parallel, torch.device("cpu"))
    step = TrainStep(parsed, made, torch.device("cpu"))
    rows = methods.batch(parsed, first, last)
    results = []
    gradients: dict[str, Tensor] = {}
    for number in range(STEPS):
        results.append(step(rows, Progress(number, STEPS)))
        gradients = gradients or full({name: p.grad for name, p in made.named_parameters() if p.grad is not None})
    with distributed.whole(made), torch.no_grad():
        # ranks score unequal numbers of batches; the last waits for none
        for _ in range(distributed.rank() + 1):
            encoded = made.backbone["image"](rows.views["image"]).pooled
    after = step(rows, Progress(STEPS, STEPS + 1))
    return {
        "terms": results[0].terms,
        "norm": results[0].norm,
        "gradients": gradients,
        "state": full(made.state_dict()),
        "encoded": encoded,
        "after": after.terms,
        "spread": sum(distributed.is_spread(p) for p in made.parameters()),
        "local": sum(distributed.local(p).numel() for p in made.parameters()),
    }


def main() -> None:
    distributed.start(torch.device("cpu"))
    rank, share = distributed.rank(), SAMPLES // distributed.world_size()
    registry = Registry.discover()
    results: dict[str, Any] = {}
    for layout in LAYOUTS:
        cases = methods.CASES if layout == "parts" else ("cosmos", "slip" if "few" in layout else "flava")
        for case in cases:
            if case != "cosmos bf16":
                results[f"{case}, {layout}"] = train(case, layout, registry, rank * share, (rank + 1) * share)
    torch.save(results, Path(sys.argv[1]) / f"rank-{rank}.pt")
    distributed.stop()


if __name__ == "__main__":
    main()
