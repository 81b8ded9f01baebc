"""TIPS's image-text loss: one class token learns from the web's caption, another from the synthetic one."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from distill_core import GLOBAL, Needs, Outputs, Plan, Rows, wide
from distill_vl.contrastive import ContrastiveConfig, ContrastiveLoss


class TwoTokenContrastiveConfig(ContrastiveConfig):
    """Options of TIPS's image-text loss; both captions share the scale."""

    modalities: tuple[str, str] = ("image", "text")
    """The one with two class tokens, and the one with two captions."""


class TwoTokenContrastive(ContrastiveLoss):
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
        width, dim = image.spec.width, image.spec.dim
        self.projection = nn.Parameter(width**-0.5 * torch.randn(width, dim))

    @classmethod
    def needs(cls, config: TwoTokenContrastiveConfig, plan: Plan) -> Needs:
        """A global view of the first modality and two of the second."""
        a, b = config.modalities
        return Needs(student=config.modalities, views={a: {GLOBAL: 1}, b: {GLOBAL: 2}})

    @classmethod
    def problems(cls, config: TwoTokenContrastiveConfig, plan: Plan) -> Iterable[str]:
        """Two class tokens; one width D on both sides."""
        have = plan.modalities[config.modalities[0]].spec.class_tokens
        if have < 2:
            yield f"{cls.name!r} needs 2 class tokens of {config.modalities[0]!r}; its backbone gives {have}"
        yield from super().problems(config, plan)

    def gathers(self, outputs: Outputs) -> Iterable[Rows]:
        """Its views of both modalities; the second class token's embedding is made later."""
        a, b = self.config.modalities
        return [outputs.student[a].rows[self.views], outputs.student[b].rows[:2]]

    def forward(self, outputs: Outputs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """One term; a metric for each caption."""
        a, b = self.config.modalities
        classes = outputs.student[a].class_tokens
        assert classes is not None
        second = classes[self.views, :, 1] @ self.projection
        with torch.autocast(second.device.type, enabled=False):
            second = normalize(wide(second), dim=-1)
        captions = outputs.student[b].rows
        terms = {
            "web": self.pairs(outputs.student[a].rows[self.views], captions[:1]).mean(),
            "synthetic": self.pairs(outputs.rows(second), captions[1:2]).mean(),
        }
        metrics = {name: term.detach() for name, term in terms.items()}
        return {self.name: (terms["web"] + terms["synthetic"]) / 2}, metrics | self.metrics()
