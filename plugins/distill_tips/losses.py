"""TIPS's image-text loss: one class token learns from the web's caption, another from the synthetic one."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import normalize

from distill_core.components import Loss, LossConfig, Needs, Plan, same_dim
from distill_core.distributed import all_gather, rank, world_size
from distill_core.types import GLOBAL, Outputs, Progress
from distill_kernels import multi_view_info_nce


class TwoTokenContrastiveConfig(LossConfig):
    """Options of TIPS's image-text loss."""

    modalities: tuple[str, str] = ("image", "text")
    """The one with two class tokens, and the one with two captions."""
    temperature: Annotated[float, Field(gt=0)] = 0.07
    """The scale starts at ln(1 / temperature); both captions share it."""
    max_scale: Annotated[float, Field(ge=1)] = 100.0
    """The scale is clamped to [0, ln max_scale] after each step."""


class TwoTokenContrastive(Loss):
    """(InfoNCE(embedding, first caption) + InfoNCE(second class token, second caption)) / 2 (TIPS, section 3.1).

    Of each global view of the first modality, over the global batch. The embedding is made of the first class token by
    the backbone; the second has a `projection` [W, D] of its own here.
    """

    name = "two_token_contrastive"
    Config = TwoTokenContrastiveConfig

    def __init__(self, config: TwoTokenContrastiveConfig, plan: Plan) -> None:
        super().__init__(config, plan)
        image = plan.modalities[config.modalities[0]]
        self.views = list(image.views(GLOBAL))
        self.projection = nn.Parameter(image.width**-0.5 * torch.randn(image.width, image.dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / config.temperature)))

    @classmethod
    def needs(cls, config: TwoTokenContrastiveConfig, plan: Plan) -> Needs:
        """A global view of the first modality and two of the second."""
        a, b = config.modalities
        return Needs(modalities=config.modalities, views={a: {GLOBAL: 1}, b: {GLOBAL: 2}})

    @classmethod
    def problems(cls, config: TwoTokenContrastiveConfig, plan: Plan) -> Iterable[str]:
        """Two class tokens; one width D on both sides."""
        have = plan.modalities[config.modalities[0]].class_tokens
        if have < 2:
            yield f"{cls.name!r} needs 2 class tokens of {config.modalities[0]!r}; its backbone gives {have}"
        yield from same_dim(cls.name, config.modalities, plan)

    def forward(self, outputs: Outputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """One term; a metric for each caption."""
        a, b = self.config.modalities
        classes = outputs.student[a].class_tokens
        assert classes is not None
        second = classes[self.views, :, 1] @ self.projection
        with torch.autocast(second.device.type, enabled=False):
            second = normalize(second.to(torch.promote_types(second.dtype, torch.float32)), dim=-1)
            web, synthetic = outputs.embedding(f"student.{b}")[:2].chunk(2)
            first = outputs.embedding(f"student.{a}")[self.views]
            if world_size() == 1:
                pairs = [self._pairs(first, web), self._pairs(second, synthetic)]
            else:
                web_all, synthetic_all = outputs.gather(f"student.{b}")[:2].chunk(2)
                first_all = outputs.gather(f"student.{a}")[self.views]
                pairs = [
                    self._pairs(first, web, first_all, web_all),
                    self._pairs(second, synthetic, all_gather(second, dim=1), synthetic_all),
                ]
            terms = [each.mean() for each in pairs]
        metrics = {"web": terms[0].detach(), "synthetic": terms[1].detach()}
        return {self.name: (terms[0] + terms[1]) / 2}, metrics | {"scale": self.logit_scale.detach().exp()}

    def _pairs(self, a: Tensor, b: Tensor, a_all: Tensor | None = None, b_all: Tensor | None = None) -> Tensor:
        """[Va, Vb] losses of a [Va, B, D] and b [Vb, B, D], against all ranks' rows where given."""
        scale = self.logit_scale.exp()
        if a_all is None or b_all is None:
            return multi_view_info_nce(a, b, scale)
        return multi_view_info_nce(a, b, scale, a_all=a_all, b_all=b_all, offset=rank() * a.shape[1])

    @torch.no_grad()
    def after_step(self, outputs: Outputs, progress: Progress) -> None:
        """Clamp the learned scale to [0, ln max_scale]."""
        self.logit_scale.clamp_(0.0, math.log(self.config.max_scale))
