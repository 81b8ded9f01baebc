"""A batch in a recipe's shapes without its data: for what is asked of a recipe before it trains."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch

from distill_core.batch import Batch, Sample
from distill_core.contracts.slot import Slot
from distill_core.contracts.teacher import Visit
from distill_core.data.batches import Collate, Item, SampleViews
from distill_core.errors import UserError
from distill_core.recipe.sections import Recipe
from distill_core.registry import Plugins
from distill_core.teachers.copies import CopiedTeacher

_DISTINCT = 4


def example_batch(recipe: Recipe, size: int) -> Batch:
    """`size` samples as training's workers make them, of a few of the conformance cases' samples in turn.

    The number of views, their sizes and roles are the recipe's, those that a copied teacher draws for itself included;
    how long texts are is the samples' own. Fields are zeros. Raises `UserError` for an augmentation without such a
    sample.
    """
    cases = Plugins.discover().conformance_cases()
    augment, joint = recipe.build_augmentations()
    draw = SampleViews(augment, recipe.seed, joint=joint)
    collators = recipe.collators()
    teachers = {id: node for id, node in recipe.all_teachers.items() if issubclass(node.cls, CopiedTeacher)}
    made = {id: node.cls.reader(node.config, id, recipe.plan.teachers[id], collators) for id, node in teachers.items()}
    readers = {id: reader for id, reader in made.items() if reader is not None}
    examples = []
    for i in range(min(size, _DISTINCT)):
        sample = {"__key__": str(i), "__url__": "example"}
        nodes: list[Slot[Any]] = [*recipe.augment.values(), *recipe.joint.values()]
        for node in nodes:
            make = cases.of(node.cls).sample
            if make is None:
                raise UserError(
                    f"{node.path}: its plugin gives no sample of {node.cls.name!r} (hook distill_conformance_cases)"
                )
            sample |= _with_json_of(sample, make(node.config, np.random.default_rng(i)))
        views, visit = draw(sample, 0), Visit(recipe.seed, 0, str(i))
        examples.append((views, {id: read(sample, views, visit) for id, read in readers.items()}))
    items = []
    for i in range(size):
        views, own = examples[i % len(examples)]
        items.append(Item(views=views, key=str(i), seed=i, teacher=own))
    of_teachers = {id: reader.collators for id, reader in readers.items()}
    batch = Collate(collators, maskers=recipe.maskers(), teachers=of_teachers)(items)
    fields = recipe.plan.fields
    batch.fields = {name: torch.from_numpy(np.zeros((size, *x.shape), x.dtype)) for name, x in fields.items()}
    return batch


def _with_json_of(sample: Sample, more: Sample) -> Sample:
    """`more`, whose json, if both have one, holds the fields of both: augmentations read their own."""
    if "json" not in sample or "json" not in more:
        return more
    return {**more, "json": json.dumps(json.loads(sample["json"]) | json.loads(more["json"])).encode()}
