"""A modality without a tower: its views are collated, and losses read them as they are."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from distill_core.batch import View, stack_views
from distill_core.interfaces import Backbone, Collator
from distill_core.outputs import Encoded
from distill_core.plan import BackboneSpec


class Raw(Backbone):
    """No tower: arrays, tensors or numbers of one shape are stacked. A loss that names the modality in `Needs.raw`
    reads them in `Outputs.views`; nothing encodes, scores or averages them. Extend it for another
    `collator` (token ids).

    A label or an array that is one a sample, and the same each time, is rather a field (`data.fields`).
    """

    name = "raw"

    @classmethod
    def spec(cls, config: Any) -> BackboneSpec:
        """No width."""
        return BackboneSpec(0, 0, has_tokens=False)

    @classmethod
    def collator(cls, config: Any) -> Collator:
        """Stacks."""
        return stack_views

    def encode(self, x: Tensor, *, tokens: bool, token_mask: Tensor | None) -> Encoded:
        """Raises TypeError: it is never built."""
        raise TypeError(f"{self.name!r} encodes nothing")


def example_views(config: Any, rng: np.random.Generator) -> list[View]:
    """For the conformance checks."""
    return [View(rng.standard_normal(3, dtype=np.float32)) for _ in range(2)]
