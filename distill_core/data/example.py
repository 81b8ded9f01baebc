"""A batch in a recipe's shapes without its data: for what is asked of a recipe before it trains."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from distill_core.batch import Batch
from distill_core.contracts.slot import Slot
from distill_core.data.batches import Collate, Item, SampleViews
from distill_core.errors import UserError
from distill_core.recipe.sections import Recipe
from distill_core.registry import Plugins

_DISTINCT = 4


def example_batch(recipe: Recipe, size: int) -> Batch:
    """`size` samples as training's workers make them, of a few of the conformance cases' samples in turn.

    The number of views, their sizes and roles are the recipe's; how long texts are is the samples' own. Fields are
    zeros. Raises `UserError` for an augmentation without such a sample.
    """
    cases = Plugins.discover().conformance_cases()
    augment, joint = recipe.build_augmentations()
    draw = SampleViews(augment, recipe.seed, joint=joint)
    views = []
    for i in range(min(size, _DISTINCT)):
        sample = {"__key__": str(i), "__url__": "example"}
        nodes: list[Slot[Any]] = [*recipe.augment.values(), *recipe.joint.values()]
        for node in nodes:
            make = cases.of(node.cls).sample
            if make is None:
                raise UserError(
                    f"{node.path}: its plugin gives no sample of {node.cls.name!r} (hook distill_conformance_cases)"
                )
            sample |= make(node.config, np.random.default_rng(i))
        views.append(draw(sample, 0))
    collators = {name: node.cls.collator(node.config) for name, node in recipe.backbone.items()}
    items = [Item(views=views[i % len(views)], key=str(i), seed=i) for i in range(size)]
    batch = Collate(collators, maskers=recipe.maskers())(items)
    for name, field in recipe.plan.fields.items():
        batch.fields[name] = torch.from_numpy(np.zeros((size, *field.shape), field.dtype))
    return batch
