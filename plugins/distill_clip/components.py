"""CLIP's loss."""

from __future__ import annotations

from torch import Tensor

from distill_core import Outputs
from distill_vl.contrastive import ContrastiveLoss


class Clip(ContrastiveLoss):
    """Mean of the two cross-entropies of exp(logit_scale) * image @ text.T over the global batch, first views only."""

    name = "clip"

    def forward(self, outputs: Outputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        ((a, b),) = self.sides(outputs)
        pairs = self.pairs(a, b)
        return {"clip": pairs.mean()}, self.metrics()
