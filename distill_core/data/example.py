"""A batch in a recipe's shapes without its data: for what is asked of a recipe before it trains."""

from __future__ import annotations

import numpy as np

from distill_core.batch import Batch
from distill_core.data.stream import SampleViews
from distill_core.recipe.sections import Recipe

_DISTINCT = 4


def example_batch(recipe: Recipe, size: int) -> Batch:
    """`size` samples as training's workers make them, of a few example samples (`Augmentation.example_sample`) in turn.

    The number of views, their sizes and roles are the recipe's; how long texts are is the examples' own.
    """
    draw = SampleViews({name: node.build() for name, node in recipe.augment.items()}, recipe.seed)
    views = []
    for i in range(min(size, _DISTINCT)):
        sample = {"__key__": str(i), "__url__": "example"}
        for node in recipe.augment.values():
            sample |= node.cls.example_sample(node.config, np.random.default_rng(i))
        views.append(draw(sample, 0))
    collators = {name: node.cls.collator(node.config) for name, node in recipe.backbone.items()}
    turns, seeds = [views[i % len(views)] for i in range(size)], list(range(size))
    made = {name: collate([turn[name] for turn in turns], seeds) for name, collate in collators.items()}
    return Batch(made, [str(i) for i in range(size)])
