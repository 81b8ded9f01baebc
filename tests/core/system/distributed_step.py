"""One step of the COSMOS and CLIP losses in float64 on this rank's rows of a joint batch; run by test_distributed.

`python -m torch.distributed.run --nproc-per-node N distributed_step.py OUT` writes OUT/rank-R.pt.
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

RECIPE = """
augment: {image: {name: multi_crop, size: 8, local_size: 4, local: 1}, text: {name: text_crop, global: 2, local: 1}}
backbone:
  image: {name: vit, image_size: 8, patch: 4, width: 8, layers: 1, heads: 2, dim: 6}
  text: {name: clip_text, context: 9, width: 8, layers: 1, heads: 2, dim: 6}
fusion: {name: cross_attention, heads: 2}
loss: [{name: contrastive}, {name: cross_modal_distillation, weight: 0.7}, {name: clip, weight: 0.3}]
teacher: {}
data: {source: {name: webdataset, urls: none.tar}}
train: {steps: 1}
"""
SAMPLES = 6


def objective() -> Objective:
    torch.manual_seed(0)
    made = build_objective(parse_recipe(RECIPE, "r.yaml", registry=Registry.discover())).double()
    # away from the start, where the teacher is the student
    with torch.no_grad():
        for parameter in made.backbone.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return made


def batch(first: int, last: int, tokens: int = 7) -> Batch:
    """Rows first..last of a batch of SAMPLES, whose texts have `tokens` tokens."""
    generator = torch.Generator().manual_seed(1)

    def pictures(views: int, size: int) -> torch.Tensor:
        return torch.randn(views, SAMPLES, 3, size, size, generator=generator, dtype=torch.float64)[:, first:last]

    ids = torch.randint(1, 48, (3, SAMPLES, tokens), generator=generator)
    ids[..., -1] = 49407  # end of text
    ids = ids[:, first:last]
    image = Views([Group(pictures(2, 8), "global"), Group(pictures(1, 4), "local")])
    text = Views([Group(ids[:2], "global"), Group(ids[2:], "local")])
    return Batch({"image": image, "text": text}, [f"k{i}" for i in range(first, last)])


def step(first: int, last: int, tokens: int = 7) -> dict[str, Any]:
    """Terms of these rows and the averaged gradients."""
    made = objective()
    losses = made.losses(made.represent(batch(first, last, tokens), Progress(0, 1)))
    losses.total.backward()
    named = [(name, p) for name, p in made.named_parameters() if not name.startswith("teacher.")]
    distributed.average_gradients([p for _, p in named])
    return {
        "terms": {name: term.detach() for name, term in losses.terms.items()},
        "gradients": {name: p.grad for name, p in named},
    }


def main() -> None:
    distributed.start(torch.device("cpu"))
    rank, world = distributed.rank(), distributed.world_size()
    share = SAMPLES // world
    result = step(rank * share, (rank + 1) * share)
    lonely = torch.nn.Parameter(torch.zeros(2))
    if rank == 1:
        lonely.grad = torch.tensor([2.0, 4.0])
    distributed.average_gradients([lonely])
    result["lonely"] = lonely.grad
    result["any"] = [distributed.any_rank(rank == 1), distributed.any_rank(False)]
    result["objects"] = distributed.gather_objects({"rank": rank})
    torch.save(result, Path(sys.argv[1]) / f"rank-{rank}.pt")
    distributed.stop()


if __name__ == "__main__":
    main()
