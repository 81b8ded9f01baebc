"""SigLIP's loss (section 3.2, equation 1), its negatives gathered or travelling round a ring (section 3.3)."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from distill_core.components import Plan
from distill_core.distributed import rank, world_size
from distill_core.types import Outputs
from distill_kernels import multi_view_sigmoid
from distill_siglip.ring import ring_sigmoid
from distill_towers.contrastive import ContrastiveConfig, ContrastiveLoss


class SigLipConfig(ContrastiveConfig):
    """Defaults are the paper's: scale 10 and bias -10 to start from, neither clamped."""

    temperature: Annotated[float, Field(gt=0)] = 0.1
    """The scale starts at 1 / temperature."""
    max_scale: Annotated[float, Field(ge=1)] | None = None
    """The scale is clamped to 1..max_scale after each step; null leaves it free."""
    bias: float = -10.0
    """The learned bias starts here: at first, every pair is taken for a negative."""
    exchange: Literal["gather", "ring"] = "gather"
    """How ranks see each other's negatives: all at once, or one neighbour's at a time (memory does not grow with the
    ranks). The loss and its gradients are the same."""


class SigLip(ContrastiveLoss):
    """Mean over rows i of the sum over columns j of -log sigmoid(+-(scale * a_i . b_j + bias)), + where i = j; first
    views only, columns of all ranks."""  # fmt: skip

    name = "siglip"
    Config = SigLipConfig

    def __init__(self, config: SigLipConfig, plan: Plan) -> None:
        super().__init__(config, plan)
        self.logit_bias = nn.Parameter(torch.tensor(config.bias))

    def forward(self, outputs: Outputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """One term."""
        keys = [f"student.{modality}" for modality in self.config.modalities]
        a, b = (outputs.embedding(key)[:1] for key in keys)
        with torch.autocast(a.device.type, enabled=False):
            scale, bias = self.logit_scale.exp(), self.logit_bias
            if world_size() == 1:
                pairs = multi_view_sigmoid(a, b, scale, bias)
            elif self.config.exchange == "ring":
                pairs = ring_sigmoid(a, b, scale, bias)
            else:
                a_all, b_all = (outputs.gather(key)[:1] for key in keys)
                offset = rank() * a.shape[1]
                pairs = multi_view_sigmoid(a, b, scale, bias, a_all=a_all, b_all=b_all, offset=offset)
        return {"siglip": pairs.mean()}, self.metrics() | {"bias": bias.detach().clone()}
