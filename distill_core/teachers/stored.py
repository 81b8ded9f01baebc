"""A teacher whose embeddings are fields of the samples."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from distill_core.batch import Batch, Group, Sample, View, Views
from distill_core.contracts.component import ComponentConfig
from distill_core.contracts.teacher import Teacher, TeacherConfig, TeacherReader, Visit
from distill_core.errors import BadSample
from distill_core.interfaces import Collator
from distill_core.outputs import Features
from distill_core.plan import BackboneSpec, TeacherPlan


class StoredField(ComponentConfig):
    """Where a modality's embeddings are."""

    field: str
    """The field of a sample (a .npy array): [D], the same for all views, or [V, D], one for each."""
    dim: Annotated[int, Field(gt=0)]
    """Their width D."""


class StoredConfig(TeacherConfig):
    """Fields of the samples, as `distill data join` adds them."""

    fields: Annotated[dict[str, StoredField], Field(min_length=1)]
    """Modality -> its embeddings, as {NAME: {field: teacher.npy, dim: 512}}."""


class Stored(Teacher):
    """Embeddings that were computed before and lie in the samples. It has no towers, and nothing to save."""

    name = "stored"
    Config = StoredConfig
    examples = ({"fields": {"first": {"field": "embedding.npy", "dim": 6}}},)

    @classmethod
    def specs(cls, config: Any, student: Mapping[str, BackboneSpec]) -> Mapping[str, BackboneSpec]:
        """Embeddings alone: no tokens."""
        return {m: BackboneSpec(own.dim, own.dim, has_tokens=False) for m, own in config.fields.items() if m in student}

    @classmethod
    def reader(
        cls, config: Any, name: str, plan: TeacherPlan, collators: Mapping[str, Collator]
    ) -> TeacherReader | None:
        """Reads the fields."""
        fields = {m: (own.field, len(plan.views[m]), own.dim) for m, own in config.fields.items() if m in plan.views}
        return StoredFields(dict.fromkeys(fields, stack_embeddings), fields)

    def encode(self, batch: Batch, tokens_of: Mapping[str, Sequence[int]]) -> dict[str, Features]:
        """What was read."""
        return {m: Features(views.groups[0].x) for m, views in batch.teacher[self.id].items()}


def example_sample(config: StoredConfig, rng: np.random.Generator) -> Sample:
    """What the conformance checks give it to read."""
    fields = {}
    for own in config.fields.values():
        file = io.BytesIO()
        np.save(file, rng.standard_normal(own.dim, dtype=np.float32))
        fields[own.field] = file.getvalue()
    return fields


@dataclass(frozen=True)
class StoredFields:
    """A `TeacherReader` of fields: modality -> (field, views V, width D)."""

    collators: Mapping[str, Collator]
    fields: Mapping[str, tuple[str, int, int]]

    def __call__(self, sample: Sample, views: Mapping[str, list[View]], visit: Visit) -> dict[str, list[View]]:
        """A view an embedding. Raises `BadSample` for a field that is missing or of another shape."""
        return {m: [View(row) for row in _rows(sample, *own)] for m, own in self.fields.items() if m in views}


def _rows(sample: Sample, field: str, views: int, dim: int) -> Any:
    """[V, D] float32."""
    if field not in sample:
        raise BadSample(f"has no field {field!r}")
    try:
        array = np.load(io.BytesIO(sample[field]), allow_pickle=False).astype(np.float32)
    except (ValueError, EOFError, OSError) as error:
        raise BadSample(f"{field}: is no array in .npy format: {error}") from error
    if array.shape not in ((dim,), (views, dim)):
        raise BadSample(f"{field}: has the shape {list(array.shape)}, not [{dim}] or [{views}, {dim}]")
    if not np.isfinite(array).all():
        raise BadSample(f"{field}: holds values that are not finite")
    return np.broadcast_to(array, (views, dim))


def stack_embeddings(samples: list[list[View]], seeds: Sequence[int] = ()) -> Views:
    """One group [V, B, D]."""
    rows = np.stack([np.stack([view.data for view in views]) for views in samples], axis=1)
    x: Tensor = torch.from_numpy(rows)
    return Views([Group(x)])
