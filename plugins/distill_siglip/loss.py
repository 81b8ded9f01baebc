"""SigLIP's loss (section 3.2, equation 1), its negatives gathered or travelling round a ring (section 3.3)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from distill_core import Outputs, Rows, world_size
from distill_siglip.ring import ring_sigmoid
from distill_vl.contrastive import Sigmoid, SigmoidConfig


class SigLipConfig(SigmoidConfig):
    """Defaults are the paper's: scale 10 and bias -10 to start from, neither clamped."""

    max_scale: Annotated[float, Field(ge=1)] | None = None
    """The scale is clamped to 1..max_scale after each step; null leaves it free."""
    exchange: Literal["gather", "ring"] = "gather"
    """How ranks see each other's negatives: all at once, or one neighbour's at a time (memory does not grow with the
    ranks). The loss and its gradients are the same."""


class SigLip(Sigmoid):
    """Mean over rows i of the sum over columns j of -log sigmoid(+-(scale * a_i . b_j + bias)), + where i = j; first
    views only, columns of all ranks."""  # fmt: skip

    name = "siglip"
    Config = SigLipConfig

    def gathers(self, outputs: Outputs) -> Iterable[Rows]:
        """Nothing, where columns travel round the ring."""
        return super().gathers(outputs) if self.config.exchange == "gather" else ()

    def forward(self, outputs: Outputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        ((a, b),) = self.sides(outputs)
        if self.config.exchange == "ring" and world_size() > 1:
            with torch.autocast(a.embedding.device.type, enabled=False):
                pairs = ring_sigmoid(a.embedding, b.embedding, self.logit_scale.exp(), self.logit_bias)
        else:
            pairs = self.pairs(a, b)
        return {"siglip": pairs.mean()}, self.metrics()
