"""KoLeo: spreads embeddings of a batch apart (Sablayrolles et al. 2019; DINOv2, section 4)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from distill_core import GLOBAL, Loss, LossConfig, Needs, Outputs, Plan, Scheduled, wide


class KoLeoConfig(LossConfig):
    """Defaults are DINOv2's."""

    weight: Scheduled[Annotated[float, Field(ge=0)]] = Scheduled(0.1)
    """Factor of the term in the total."""

    modality: str = "image"
    """The modality whose class tokens are spread."""


class KoLeo(Loss):
    """Sum over global views of -mean ln |x - nearest other x|, x the L2-normalised first class tokens of this rank.

    A sum, not a mean, over views: so DINOv2's public code weighs it.
    """

    name = "koleo"
    Config = KoLeoConfig
    across_ranks = False
    partial = True

    def __init__(self, config: KoLeoConfig, plan: Plan) -> None:
        super().__init__(config, plan)
        self.views = list(plan.modalities[config.modality].views(GLOBAL))

    @classmethod
    def needs(cls, config: KoLeoConfig, plan: Plan) -> Needs:
        """One modality with a global view."""
        return Needs(student=(config.modality,), views={config.modality: {GLOBAL: 1}}, embeddings=())

    @classmethod
    def problems(cls, config: KoLeoConfig, plan: Plan) -> Iterable[str]:
        if plan.modalities[config.modality].spec.class_tokens == 0:
            yield f"{cls.name!r} needs a class token of {config.modality!r}; its backbone gives none"

    def forward(self, outputs: Outputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """One term; 0 for a batch of one sample."""
        classes = outputs.student[self.config.modality].class_tokens
        assert classes is not None
        with torch.autocast(classes.device.type, enabled=False):
            x = normalize(wide(classes[self.views, :, 0]), dim=-1)
            if x.shape[1] == 1:
                return {"koleo": x.sum() * 0}, {}
            with torch.no_grad():
                alike = torch.einsum("vbd,vcd->vbc", x, x)
                alike.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
                nearest = alike.argmax(-1)
            other = torch.gather(x, 1, nearest[..., None].expand_as(x))
            distance = (x - other).square().sum(-1).add(1e-16).sqrt()
            return {"koleo": -(distance + 1e-8).log().mean(1).sum()}, {}
