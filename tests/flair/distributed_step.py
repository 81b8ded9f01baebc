"""One step of FLAIR in float64 on this rank's rows of a joint batch.

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
augment: {image: {name: random_crop, size: 8}, text: {name: sampled_captions, captions: 3}}
backbone:
  image: {name: vit, image_size: 8, patch: 4, width: 8, layers: 1, heads: 2, dim: 6}
  text: {name: clip_text, context: 9, width: 8, layers: 1, heads: 2, dim: 6}
fusion: {name: text_conditioned_pool, queries: [text], heads: 2}
loss: [{name: flair, negatives: all, chunk: 2, temperature: 0.3, bias: -1.5}]
data: {source: {name: webdataset, urls: none.tar}}
train: {steps: 1}
"""
SAMPLES = 6


def objective(**options: Any) -> Objective:
    """`options` replace the loss's; weights away from their start."""
    torch.manual_seed(0)
    sets = [f"loss.0.{name}={value}" for name, value in options.items()]
    made = build_objective(parse_recipe(RECIPE, "r.yaml", registry=Registry.discover(), overrides=sets)).double()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if not name.startswith("loss."):
                parameter += 0.2 * torch.randn_like(parameter)
    return made


def batch(first: int = 0, last: int = SAMPLES) -> Batch:
    """Rows first..last of a batch of SAMPLES."""
    generator = torch.Generator().manual_seed(1)
    pictures = torch.randn(1, SAMPLES, 3, 8, 8, generator=generator, dtype=torch.float64)
    ids = torch.randint(1, 48, (3, SAMPLES, 7), generator=generator)
    ids[..., -1] = 49407  # end of text
    image, text = Views([Group(pictures[:, first:last])]), Views([Group(ids[:, first:last])])
    return Batch({"image": image, "text": text}, [f"k{i}" for i in range(first, last)])


def step(first: int, last: int, **options: Any) -> dict[str, Any]:
    """Terms of these rows and the averaged gradients."""
    made = objective(**options)
    torch.manual_seed(7)
    losses = made.losses(made.represent(batch(first, last), Progress(0, 1)))
    losses.total.backward()
    named = list(made.named_parameters())
    distributed.average_gradients([p for _, p in named])
    return {
        "terms": {name: term.detach() for name, term in losses.terms.items()},
        "gradients": {name: p.grad for name, p in named if p.grad is not None},
    }


def main() -> None:
    distributed.start(torch.device("cpu"))
    rank, share = distributed.rank(), SAMPLES // distributed.world_size()
    rows = (rank * share, (rank + 1) * share)
    made = {negatives: step(*rows, negatives=negatives) for negatives in ("all", "one")}
    torch.save(made, Path(sys.argv[1]) / f"rank-{rank}.pt")
    distributed.stop()


if __name__ == "__main__":
    main()
