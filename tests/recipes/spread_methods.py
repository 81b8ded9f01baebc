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

from distill_core.batch import Batch, Group, Views
from distill_core.contracts.schedule import Scheduled
from distill_core.contracts.weights import LoadReport, WeightLoader
from distill_core.gradients import GradientLimit
from distill_core.objective import Objective
from distill_core.outputs import Progress
from distill_core.parallel import lay_out
from distill_core.recipe.build import build_objective, prepare_teachers
from distill_core.recipe.sections import ParallelConfig, Recipe
from distill_core.registry import Entry, Registry
from distill_core.step import TrainStep
from distill_core.system import distributed, sharded

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
VIT = "{name: vit, image_size: %d, patch: 4, width: 8, layers: 1, heads: 2, dim: 6}"
TEXT = "{name: clip_text, context: 9, width: 8, layers: 1, heads: 2, dim: 6}"
CROPS = "{name: multi_crop, size: 12, local_size: 4, local: 1}"
FROZEN = f"name: frozen, backbone: {{image: {VIT}, text: {TEXT}}}, weights: [drawn]"
TEACHERS = {
    "frozen": f"{{{FROZEN % 8}}}",
    "frozen, larger": f"{{{FROZEN % 12}, augment: {{image: {CROPS}}}}}",
    "snapshot": "{name: snapshot, every: 2}",
    "stored": "{name: stored, fields: {image: {field: i.npy, dim: 6}, text: {field: t.npy, dim: 6}}}",
}
"""What COSMOS learns from in place of its moving average."""
LIMITS = {kind: GradientLimit(by=kind, max=Scheduled(0.05)) for kind in ("part", "parameter")}


CASES = [
    *((case, "parts") for case in methods.CASES if case != "cosmos bf16"),
    *((case, "parts") for case in ("cosmos by part", "cosmos by parameter")),
    *((case, layout) for case in ("cosmos", "flava") for layout in ("copies", "parts of two", "full", "selective")),
    *((case, layout) for case in ("cosmos", "slip") for layout in ("few at a time", "few in parts")),
    *((case, layout) for case in TEACHERS for layout in ("parts", "few in parts")),
]


class Drawn(WeightLoader):
    """Weights from a seed of their own."""

    name = "drawn"
    examples = ({},)

    def apply(self, objective: Objective) -> LoadReport:
        generator = torch.Generator().manual_seed(3)
        named = dict(objective.named_parameters())
        for parameter in named.values():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64).mul(0.3))
        return LoadReport("drawn", frozenset(named))


def case_of(name: str, registry: Registry) -> Recipe:
    """A case of distributed_methods, or COSMOS with one of these teachers."""
    if name not in TEACHERS:
        return methods.recipe(methods.CASES[name], registry)
    entries = [*registry.entries.values(), Entry(Drawn, "mine", "mine")]
    return methods.recipe(methods.CASES["cosmos"] | {"teacher": TEACHERS[name]}, Registry(entries))


def batch_of(parsed: Recipe, first: int, last: int) -> Batch:
    """Rows of a joint batch, with what the teacher reads in the loader."""
    rows: Batch = methods.batch(parsed, first, last)
    generator = torch.Generator().manual_seed(2)
    for name, teacher in parsed.all_teachers.items():
        shapes: dict[str, tuple[int, ...]] = {}
        if teacher.cls.name == "stored":
            shapes = {"image": (2, SAMPLES, 6), "text": (2, SAMPLES, 6)}
        elif teacher.cls.name == "frozen" and teacher.config.augment:
            shapes = {"image": (2, SAMPLES, 3, 12, 12)}
        drawn = {m: torch.randn(shape, generator=generator, dtype=torch.float64) for m, shape in shapes.items()}
        rows.teacher[name] = {m: Views([Group(x[:, first:last])]) for m, x in drawn.items()}
    return rows


def full(tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    """Whole tensors; every rank must ask."""
    return {name: sharded.joined(x).detach().clone() for name, x in tensors.items()}


def train(case: str, layout: str, registry: Registry, first: int, last: int) -> dict[str, Any]:
    """The first step's terms and gradients, and student and teacher after a few steps of the trainer. A case may end
    with what the gradients' limit is `by`."""
    case, _, by = case.partition(" by ")
    parsed = case_of(case, registry)
    options = {"parallel": ParallelConfig(**LAYOUTS[layout]), "clip_grad": LIMITS[by] if by else 0.5}
    parsed = parsed.model_copy(update={"train": parsed.train.model_copy(update=options)})
    torch.manual_seed(0)
    made = build_objective(parsed).double()
    prepare_teachers(made)
    with torch.no_grad():
        for parameter in [*made.backbone.parameters(), *made.loss.parameters()]:  # away from ones and zeros
            parameter += 0.1 * torch.randn_like(parameter)
    lay_out(made, parsed.train.parallel, torch.device("cpu"))
    step = TrainStep(parsed, made, torch.device("cpu"))
    rows = batch_of(parsed, first, last)
    results = []
    gradients: dict[str, Tensor] = {}
    for number in range(STEPS):
        results.append(step(rows, Progress(number, STEPS)))
        gradients = gradients or full({name: p.grad for name, p in made.named_parameters() if p.grad is not None})
    with sharded.whole(made), torch.no_grad():
        # ranks score unequal numbers of batches; the last waits for none
        for _ in range(distributed.rank() + 1):
            encoded = made.backbone["image"](rows.views["image"]).pooled
    after = step(rows, Progress(STEPS, STEPS + 1))
    of_teachers = [p for teacher in made.teachers.values() for tower in teacher.towers() for p in tower.parameters()]
    return {
        "terms": results[0].terms,
        "norm": results[0].norm,
        "gradients": gradients,
        "state": full(made.state_dict()),
        "encoded": encoded,
        "after": after.terms,
        "spread": sum(sharded.is_spread(p) for p in made.parameters()),
        "whole": sum(not sharded.is_spread(p) and p.numel() > 1 for p in of_teachers),
        "local": sum(sharded.local(p).numel() for p in made.parameters()),
    }


def main() -> None:
    distributed.start(torch.device("cpu"))
    rank, share = distributed.rank(), SAMPLES // distributed.world_size()
    registry = Registry.discover()
    results: dict[str, Any] = {}
    for case, layout in CASES:
        results[f"{case}, {layout}"] = train(case, layout, registry, rank * share, (rank + 1) * share)
    torch.save(results, Path(sys.argv[1]) / f"rank-{rank}.pt")
    distributed.stop()


if __name__ == "__main__":
    main()
