"""SigLIP's loss (section 3.2), its negatives gathered or travelling round a ring (section 3.3)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from distill_core import Outputs
from distill_vl.contrastive import Sigmoid, SigmoidConfig


class SigLipConfig(SigmoidConfig):
    """Defaults are the paper's: scale 10 and bias -10 to start from, neither clamped."""

    max_scale: Annotated[float, Field(ge=1)] | None = None
    """The scale is clamped to 1..max_scale after each step; null leaves it free."""


class SigLip(Sigmoid):
    """Mean over rows i of the sum over columns j of -log sigmoid(+-(scale * a_i . b_j + bias)), + where i = j; first
    views only, columns of all ranks."""  # fmt: skip

    name = "siglip"
    Config = SigLipConfig

    def forward(self, outputs: Outputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        ((a, b),) = self.sides(outputs)
        return {"siglip": self.pairs(a, b).mean()}, self.metrics()
