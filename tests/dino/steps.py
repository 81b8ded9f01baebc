"""Objectives and batches of the tests of DINO and iBOT, in float64; run by test_distributed as a program too.

`python -m torch.distributed.run --nproc-per-node N steps.py OUT` writes OUT/rank-R.pt.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from distill_core.batch import Batch, Group, Views
from distill_core.objective import Objective
from distill_core.outputs import Progress
from distill_core.recipe.build import build_objective
from distill_core.recipe.resolve import parse_recipe
from distill_core.registry import Registry
from distill_core.system import distributed

HEAD = "prototypes: 7, hidden: 6, bottleneck: 5"
RECIPE = """
augment: {image: {name: multi_crop, size: 12, local_size: 4, global: 2, local: 2}}
backbone:
  image: {name: vit, image_size: 12, patch: 4, width: 8, layers: 2, heads: 2, dim: 6, class_tokens: 2, masking: {}}
loss: LOSSES
teacher: {}
data: {source: {name: webdataset, urls: none.tar}}
train: {steps: 10}
"""
BOTH = (
    f"[{{name: dino, {HEAD}}}, {{name: dino, id: even, {HEAD}, centring: sinkhorn_knopp}}, "
    f"{{name: ibot, {HEAD}}}, {{name: ibot, id: even_patches, {HEAD}, centring: sinkhorn_knopp}}]"
)
SAMPLES = 6
PROGRESS = Progress(2, 10)


def objective(losses: str, recipe: str = RECIPE) -> Objective:
    """With student, teacher and centres away from the start, where student and teacher are one."""
    torch.manual_seed(0)
    parsed = parse_recipe(recipe.replace("LOSSES", losses), "r.yaml", registry=Registry.discover())
    made = build_objective(parsed).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
        for name, buffer in made.named_buffers():
            if name.endswith("center"):
                buffer.normal_(std=0.1)
    return made


def batch(first: int = 0, last: int = SAMPLES, *, masked_copies: bool = False) -> Batch:
    """Rows first..last of a batch of SAMPLES. Of the masks one is empty, and they hide different numbers."""
    generator = torch.Generator().manual_seed(1)

    def pictures(views: int, size: int) -> torch.Tensor:
        return torch.randn(views, SAMPLES, 3, size, size, generator=generator, dtype=torch.float64)[:, first:last]

    mask = torch.rand(2, SAMPLES, 9, generator=generator) < torch.linspace(0.2, 0.7, SAMPLES)[:, None]
    mask[0, 1] = False
    mask[1, 0, 3] = True
    mask = mask[:, first:last]
    crops = pictures(2, 12)
    groups = [Group(crops, "global", token_mask=None if masked_copies else mask), Group(pictures(2, 4), "local")]
    if masked_copies:
        groups.append(Group(crops[:1], "masked", token_mask=mask[:1]))
    return Batch({"image": Views(groups)}, [f"k{i}" for i in range(first, last)])


def step(first: int, last: int) -> dict[str, Any]:
    """Terms of these rows, the averaged gradients, and the centres afterwards."""
    made = objective(BOTH)
    outputs = made.represent(batch(first, last), PROGRESS)
    losses = made.losses(outputs)
    losses.total.backward()
    named = [(name, p) for name, p in made.named_parameters() if not name.startswith("teacher.")]
    distributed.average_gradients([p for _, p in named])
    made.after_step(outputs, PROGRESS)
    return {
        "terms": {name: term.detach() for name, term in losses.terms.items()},
        "gradients": {name: p.grad for name, p in named if p.grad is not None},
        "centers": {name: x.clone() for name, x in made.named_buffers() if name.endswith("center")},
    }


def main() -> None:
    distributed.start(torch.device("cpu"))
    rank, share = distributed.rank(), SAMPLES // distributed.world_size()
    torch.save(step(rank * share, (rank + 1) * share), Path(sys.argv[1]) / f"rank-{rank}.pt")
    distributed.stop()


if __name__ == "__main__":
    main()
