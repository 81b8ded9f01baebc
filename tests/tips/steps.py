"""One step of TIPS's image-text loss in float64 on this rank's rows of a joint batch; a program of the tests too.

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

RECIPE = """
augment: {image: {name: multi_crop, size: 8, local_size: 4, global: 2, local: 1}, text: {name: two_captions}}
backbone:
  image: {name: vit, image_size: 8, patch: 4, width: 8, layers: 1, heads: 2, dim: 6, class_tokens: 2}
  text: {name: clip_text, context: 9, width: 8, layers: 1, heads: 2, dim: 6}
loss: [{name: two_token_contrastive}]
data: {source: {name: webdataset, urls: none.tar}}
train: {steps: 1}
"""
SAMPLES = 6


def objective() -> Objective:
    torch.manual_seed(0)
    return build_objective(parse_recipe(RECIPE, "r.yaml", registry=Registry.discover())).double()


def batch(first: int = 0, last: int = SAMPLES) -> Batch:
    """Rows first..last of a batch of SAMPLES."""
    generator = torch.Generator().manual_seed(1)

    def pictures(views: int, size: int) -> torch.Tensor:
        return torch.randn(views, SAMPLES, 3, size, size, generator=generator, dtype=torch.float64)[:, first:last]

    ids = torch.randint(1, 48, (2, SAMPLES, 7), generator=generator)
    ids[..., -1] = 49407  # end of text
    image = Views([Group(pictures(2, 8), "global"), Group(pictures(1, 4), "local")])
    return Batch({"image": image, "text": Views([Group(ids[:, first:last])])}, [f"k{i}" for i in range(first, last)])


def step(first: int, last: int) -> dict[str, Any]:
    """The term of these rows and the averaged gradients."""
    made = objective()
    losses = made.losses(made.represent(batch(first, last), Progress(0, 1)))
    losses.total.backward()
    named = list(made.named_parameters())
    distributed.average_gradients([p for _, p in named])
    return {
        "term": losses.terms["two_token_contrastive"].detach(),
        "gradients": {name: p.grad for name, p in named if p.grad is not None},
    }


def main() -> None:
    distributed.start(torch.device("cpu"))
    rank, share = distributed.rank(), SAMPLES // distributed.world_size()
    torch.save(step(rank * share, (rank + 1) * share), Path(sys.argv[1]) / f"rank-{rank}.pt")
    distributed.stop()


if __name__ == "__main__":
    main()
